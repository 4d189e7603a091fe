"""Exponential moving average of weights and buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ExponentialAverage:
    """A second network that follows the first: average = d * average + (1 - d) * weights after every applied step.

    d grows to ``decay`` as (1 + n) / (10 + n) over the first n updates, so that a short run is not dominated by its
    random start.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
        """Follow one applied step; parameters are whole master weights in the network's order, buffers likewise."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        mine = [p.data for p in self.network.parameters()]
        torch._foreach_lerp_(mine, [p.detach() for p in parameters], 1 - decay)
        for own, new in zip(self.network.buffers(), buffers, strict=True):
            if own.is_floating_point():
                own.lerp_(new, 1 - decay)
            else:
                own.copy_(new)
