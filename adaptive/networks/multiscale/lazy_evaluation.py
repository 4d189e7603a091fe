"""Lazy evaluation: a block of several scales computes what its exit needs, the rest when an image goes on.

MSDNet's classifiers read the coarsest scale only, so the finer scales of the last layers before an exit serve the
exits behind it alone (arXiv 1703.09844, section 4.2, "lazy evaluation").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

StageScale = tuple[int, int]  # number of the stage (0: what comes in) and of the scale


class LazyBlock(nn.Module):
    """A block that can compute what its exit needs first, and the rest when the next block is run."""

    def to_exit(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Compute what this block's exit needs; returns its feature and what ``complete`` will need."""
        raise NotImplementedError

    def complete(self, *partial: Tensor) -> tuple[Tensor, ...]:
        """What ``to_exit`` returned -> the state that ``forward`` gives."""
        raise NotImplementedError


class Stage(Protocol):
    """A step of all scales at once (a dense layer or a transition), of which single scales can be computed."""

    scales: list[int]

    def reads(self, scale: int) -> list[int]:
        """Scales of the stage before that a scale is made from."""

    def make(self, scale: int, before: dict[int, Tensor]) -> Tensor:
        """Compute one scale."""


@dataclass(frozen=True)
class LazyPlan:
    """Which scales of a block's stages are computed for its exit, and which are deferred.

    Attributes:
        needed: per stage, the scales that the exit depends on.
        deferred: per stage, the other scales that the block's end depends on.
        kept: what has to be kept for the deferred ones, the exit's feature first.
        outgoing: scales behind the block, coarsest first.
    """

    needed: list[list[int]]
    deferred: list[list[int]]
    kept: list[StageScale]
    outgoing: list[int]

    @classmethod
    def of(cls, stages: Sequence[Stage]) -> LazyPlan:
        """Plan a block of these stages whose exit reads the coarsest scale."""
        last, end = stages[-1].scales, len(stages)
        for_exit, for_all = _ancestors(stages, [last[-1]]), _ancestors(stages, last)
        deferred = [sorted(every - some) for some, every in zip(for_exit, for_all, strict=True)]
        kept = {(end, scale) for scale in for_exit[end]}
        for i, stage in enumerate(stages):
            sources = {source for scale in deferred[i + 1] for source in stage.reads(scale)}
            kept |= {(i, source) for source in sources if i == 0 or source in for_exit[i]}
        feature = (end, last[-1])
        order = [feature, *sorted(kept - {feature})]
        return cls([sorted(s) for s in for_exit[1:]], deferred[1:], order, last[::-1])

    def to_exit(self, stages: Iterable[Stage], scales: dict[int, Tensor]) -> tuple[Tensor, ...]:
        """Incoming scales -> the kept tensors, the exit's feature first."""
        made: dict[StageScale, Tensor] = {(0, scale): tensor for scale, tensor in scales.items()}
        for number, (stage, wanted) in enumerate(zip(stages, self.needed, strict=True), start=1):
            scales = {scale: stage.make(scale, scales) for scale in wanted}
            made |= {(number, scale): tensor for scale, tensor in scales.items()}
        return tuple(made[key] for key in self.kept)

    def complete(self, stages: Iterable[Stage], partial: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The kept tensors -> all scales behind the block, coarsest first."""
        made = dict(zip(self.kept, partial, strict=True))
        for number, (stage, wanted) in enumerate(zip(stages, self.deferred, strict=True), start=1):
            before = {scale: tensor for (stage_number, scale), tensor in made.items() if stage_number == number - 1}
            made |= {(number, scale): stage.make(scale, before) for scale in wanted}
        return tuple(made[(len(self.needed), scale)] for scale in self.outgoing)


def _ancestors(stages: Sequence[Stage], scales: list[int]) -> list[set[int]]:
    """Per stage, from what comes in: the scales that some of the last stage's depend on."""
    wanted = [set(scales)]
    for stage in reversed(stages):
        wanted.insert(0, {source for scale in wanted[0] for source in stage.reads(scale)})
    return wanted
