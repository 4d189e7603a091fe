"""Gradient surgery between exits: PCGrad (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020,
arXiv 2001.06782).

Where two exits pull shared parameters in opposing directions, each gives up the part of its gradient that opposes the
other. The surgery is done once per step on the gradients of the whole global batch, so its result depends on neither
the number of ranks nor that of micro batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

# Spawn key: keeps these draws apart from the other uses of the seed, whose entropy looks alike.
PROJECTION_ORDER = 12

Gradients = list[Tensor | None]


@dataclass
class Regions:
    """Gradients of k exits, laid out flat by region: parameters that the same exits touch.

    ``flat[i]`` maps a region (the tuple of exits that touch it) to exit i's gradient there, (elements,);
    ``members`` maps it to the numbers of its parameters.
    """

    flat: list[dict[tuple[int, ...], Tensor]]
    members: dict[tuple[int, ...], list[int]]


def project_conflicts(gradients: Sequence[dict[tuple[int, ...], Tensor]], orders: Sequence[Sequence[int]]) -> None:
    """PCGrad, in place: gradient i loses its component along every gradient j that it conflicts with.

    For each i and each j in ``orders[i]``: where g_i . g_j < 0, g_i becomes g_i - (g_i . g_j) / |g_j|^2 g_j, with the
    original g_j and products over the regions that both touch (arXiv 2001.06782, algorithm 1). What one exit alone
    touches stays as it is.
    """
    originals = [dict(gradient) for gradient in gradients]
    for i, order in enumerate(orders):
        shared = {region for region in gradients[i] if len(region) > 1}
        gradients[i].update({region: gradients[i][region].clone() for region in shared})
        for j in order:
            common = [region for region in originals[j] if region in shared]
            if not common:
                continue
            product = torch.stack([gradients[i][r].dot(originals[j][r]) for r in common]).sum()
            square = torch.stack([originals[j][r].dot(originals[j][r]) for r in common]).sum()
            # Without a branch, so that nothing waits for the device; a gradient that is not finite stays so.
            share = torch.where(square > 0, product.clamp(max=0) / square, square)
            for region in common:
                gradients[i][region].addcmul_(originals[j][region], share, value=-1)


def projection_orders(exits: int, seed: int, step: int) -> list[list[int]]:
    """Return for every exit the others in random order, as a function of seed and step."""
    generator = np.random.default_rng(np.random.SeedSequence([seed, step], spawn_key=(PROJECTION_ORDER,)))
    return [[int(j) for j in generator.permutation(exits) if j != i] for i in range(exits)]


def lay_out(gradients: Sequence[Gradients]) -> Regions:
    """Group parameters by the exits that touch them; ``gradients[i][p]`` is exit i's for parameter p, or None."""
    members: dict[tuple[int, ...], list[int]] = {}
    for number in range(len(gradients[0])):
        touching = tuple(i for i, own in enumerate(gradients) if own[number] is not None)
        members.setdefault(touching, []).append(number)
    members.pop((), None)
    flat: list[dict[tuple[int, ...], Tensor]] = [{} for _ in gradients]
    for region, numbers in members.items():
        for i in region:
            parts = [gradients[i][number] for number in numbers]
            flat[i][region] = torch.cat([part.reshape(-1) for part in parts if part is not None])
    return Regions(flat, members)


def whole_gradients(regions: Regions, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return the sum over exits for every parameter, in its shape; zeros where no exit touches it."""
    result = [torch.zeros_like(p) for p in parameters]
    for region, numbers in regions.members.items():
        total = reduce(torch.add, [regions.flat[i][region] for i in region])
        sizes = [parameters[number].numel() for number in numbers]
        for number, part in zip(numbers, total.split(sizes), strict=True):
            result[number].copy_(part.view(parameters[number].shape))
    return result


class GradientSurgery:
    """Turns the exits' losses of a micro batch into one whose backward pass brings the changed gradient.

    Each call takes every exit's own gradient; they add up over the step's micro batches, and the last one averages
    them over the ranks, projects, and hands the sum on. The earlier ones hand on zeros, so that the engine still sees
    one backward pass per micro batch.

    Args:
        parameters: the parameters that learn.
        surrogate: (parameters, gradients) -> scalar whose backward pass gives the parameters those gradients.
        all_reduce: sums a tensor over ranks, in place.
        loss_scale: factor that keeps low-precision gradients from vanishing in the backward pass.
        accumulation: micro batches per step.
        world: number of ranks.
        seed: seed of the order of projection.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        surrogate: Callable[[Sequence[nn.Parameter], Sequence[Tensor]], Tensor],
        all_reduce: Callable[[Tensor], Tensor],
        loss_scale: Callable[[], float],
        *,
        accumulation: int,
        world: int,
        seed: int,
    ):
        self.parameters = list(parameters)
        self.surrogate, self.all_reduce, self.loss_scale = surrogate, all_reduce, loss_scale
        self.accumulation, self.world, self.seed = accumulation, world, seed
        self._sums: list[Gradients] = []

    def __call__(self, losses: Sequence[Tensor | None], step: int, micro: int) -> Tensor:
        """Return the scalar to back-propagate for a micro batch.

        Args:
            losses: every exit's weighted loss, None for an exit that does not count in this step.
            step: the step; all ranks give the same.
            micro: number of the micro batch within it, from 0.
        """
        own = self._separate_gradients(losses)
        self._sums = own if micro == 0 else _added(self._sums, own)
        if micro < self.accumulation - 1:
            return self.surrogate(self.parameters, [torch.zeros_like(p) for p in self.parameters])
        regions = lay_out(self._sums)
        self._sums = []
        for flat in regions.flat:
            for gradient in flat.values():
                self.all_reduce(gradient).div_(self.world * self.accumulation)
        project_conflicts(regions.flat, projection_orders(len(losses), self.seed, step))
        changed = whole_gradients(regions, self.parameters)
        # The engine divides every micro batch's gradient by their number.
        return self.surrogate(self.parameters, torch._foreach_mul(changed, float(self.accumulation)))

    def _separate_gradients(self, losses: Sequence[Tensor | None]) -> list[Gradients]:
        """Return every exit's gradient per parameter, None where it does not reach; frees the graph."""
        scale = self.loss_scale()
        counting = [i for i, loss in enumerate(losses) if loss is not None and loss.requires_grad]
        found: list[Gradients] = [[None] * len(self.parameters) for _ in losses]
        for i in counting:
            loss = losses[i]
            assert loss is not None
            keep = i != counting[-1]
            gradients = torch.autograd.grad(loss * scale, self.parameters, retain_graph=keep, allow_unused=True)
            # Not in place: autograd may give several parameters one and the same tensor.
            found[i] = [g if g is None or scale == 1 else g / scale for g in gradients]
        return found


def _added(sums: list[Gradients], more: list[Gradients]) -> list[Gradients]:
    return [
        [b if a is None else a if b is None else a + b for a, b in zip(mine, theirs, strict=True)]
        for mine, theirs in zip(sums, more, strict=True)
    ]
