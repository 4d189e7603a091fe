"""Where exits pull against each other: every exit's gradient in every block, their norms, and the angles between them.

The gradients are those of the exits' own cross entropies, g_ij for exit i and block j, before any technique changes
them; beside them stand their plain sum and what Gradient Equilibrium makes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.networks.network import AdaptiveNetwork


@dataclass(frozen=True)
class Conflict:
    """Gradients of k exits over k blocks, for one batch.

    Attributes:
        norms: ``norms[i][j]``, L2 norm of exit i's gradient in block j; 0 where block j lies behind exit i.
        cosines: ``cosines[j][i][m]`` between exits i and m in block j; None where one of them does not reach it.
        with_sum: of every exit, the cosine of its gradient (all blocks up to it) with the summed gradient there.
        with_equalised: the same with the equalised gradient.
        sum_norms: of every block, the norm of the summed gradient.
        equalised_norms: of every block, the norm of the equalised gradient.
        weight_norms: of every block, the norm of its convolutions' weights (behind BatchNorm their size does not change
            the function, but divides the gradient).
    """

    norms: list[list[float]]
    cosines: list[list[list[float | None]]]
    with_sum: list[float]
    with_equalised: list[float]
    sum_norms: list[float]
    equalised_norms: list[float]
    weight_norms: list[float]


def conflict(network: AdaptiveNetwork, images: Tensor, labels: Tensor) -> Conflict:
    """Measure the gradients of images (N, C, H, W) with labels (N,) in training mode; ``network`` stays as it is."""
    network = copy.deepcopy(network).train().requires_grad_(True)
    exits = len(network.exits)
    network.equilibrium = False
    own = [_by_block(network, [loss]) for loss in _losses(network, images, labels)]
    summed = [torch.stack([own[i][j] for i in range(j, exits)]).sum(0) for j in range(exits)]
    network.equilibrium = "crossing"
    equalised = _by_block(network, _losses(network, images, labels))
    return Conflict(
        norms=[[float(own[i][j].norm()) for j in range(exits)] for i in range(exits)],
        cosines=[_pairs([own[i][j] if i >= j else None for i in range(exits)]) for j in range(exits)],
        with_sum=[_cosine(own[i][: i + 1], summed[: i + 1]) for i in range(exits)],
        with_equalised=[_cosine(own[i][: i + 1], equalised[: i + 1]) for i in range(exits)],
        sum_norms=[float(g.norm()) for g in summed],
        equalised_norms=[float(g.norm()) for g in equalised],
        weight_norms=weight_norms(network),
    )


@torch.no_grad()
def weight_norms(network: AdaptiveNetwork) -> list[float]:
    """L2 norm, block by block, of all weights of convolutions together."""
    parts = [[p for p in network.block_parameters(i) if p.ndim == 4] for i in range(len(network.blocks))]
    return [float(torch.cat([p.flatten() for p in part]).norm()) for part in parts]


def _losses(network: AdaptiveNetwork, images: Tensor, labels: Tensor) -> list[Tensor]:
    return [F.cross_entropy(z, labels) for z in network(images)]


def _by_block(network: AdaptiveNetwork, losses: Sequence[Tensor]) -> list[Tensor]:
    """Gradient of the losses' sum: one flat vector per block, zeros where it does not reach."""
    blocks = [list(network.block_parameters(i)) for i in range(len(network.blocks))]
    everything = [p for block in blocks for p in block]
    found = iter(torch.autograd.grad(list(losses), everything, retain_graph=True, allow_unused=True))
    return [torch.cat([_or_zeros(next(found), p).flatten() for p in block]) for block in blocks]


def _or_zeros(gradient: Tensor | None, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if gradient is None else gradient


def _pairs(gradients: Sequence[Tensor | None]) -> list[list[float | None]]:
    """Cosines between all, None where one is missing."""
    return [[None if a is None or b is None else _cosine([a], [b]) for b in gradients] for a in gradients]


def _cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return float(F.cosine_similarity(torch.cat(list(one)).double(), torch.cat(list(other)).double(), dim=0))
