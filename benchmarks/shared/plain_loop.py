"""A network with exits as papers' repositories write it: torch alone, summed cross entropies, two-step rescaling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.networks.network import AdaptiveNetwork


class _Rescale(torch.autograd.Function):
    """Identity whose backward multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return feature.view_as(feature)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class PlainMultiExit(nn.Module):
    """The blocks and exits of an adaptive network, so that both do the same arithmetic, in the shortest loop.

    In front of exit i of k the gradient is multiplied by 1 / (k - i + 1), behind it by k - i, as the code released
    with arXiv 1908.06294 does: each a pass over the feature map that the exit reads.
    """

    def __init__(self, network: AdaptiveNetwork) -> None:
        super().__init__()
        self.blocks, self.exits = network.blocks, network.exits
        self.overwritten = network.overwritten

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, C, H, W) images -> k logits of (N, classes)."""
        state: tuple[Tensor, ...] = (images,)
        logits = []
        last = len(self.blocks) - 1
        for i, (block, exit_) in enumerate(zip(self.blocks, self.exits, strict=True)):
            state = block(*state)
            if i == last:
                logits.append(exit_(*state))
                break
            feature = _Rescale.apply(state[0], 1 / (last - i + 1))
            logits.append(exit_(feature))
            onward = _Rescale.apply(feature, float(last - i))
            state = (onward.clone() if self.overwritten[i] else onward, *state[1:])
        return logits


def summed_loss(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Sum of the exits' cross entropies."""
    return torch.stack([F.cross_entropy(z.float(), labels) for z in logits]).sum()
