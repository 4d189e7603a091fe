"""Branch points: the modules of a backbone after which an early exit can branch off, and how to choose among them.

Behind a branch point everything is computed from the few tensors that cross it: those made before and needed later.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from adaptive.errors import ModelError, nearest
from adaptive.networks.cutting.recording import FORWARD_FEATURES, Recording, Span, refs

MOST_CROSSING = 3  # tensors; more would be the inside of a densely connected block
DEPTH_PENALTY = 0.02  # of the total compute, per level of nesting: prefer a stage's end to the middle of a unit
CROSSING_PENALTY = 0.15  # per further tensor of the feature's size that crosses: only where there is nothing with one
NOTHING_SAVED = 0.99  # of the total compute: an exit from there on spares none of it


@dataclass(frozen=True)
class BranchPoint:
    """A module of the backbone after which an early exit can branch off.

    Attributes:
        name: the module.
        share: of the backbone's MACs spent up to its end.
        shape: of its output for one sample, without the batch.
        end: number of recorded operations up to its end.
        crossing: number of input-dependent tensors that are needed later.
        parents: the modules around it.
        in_place: whether its output is changed in point later on.
        company: size of the other crossing tensors, each as a share of the feature's and at most 1. A shortcut
            counts in full, a rotary embedding that all blocks read hardly.
    """

    name: str
    share: float
    shape: tuple[int, ...]
    end: int
    crossing: int
    parents: tuple[str, ...]
    in_place: bool = False
    company: float = 0.0

    @property
    def shape_with_batch(self) -> tuple[int, ...]:
        """Shape of its output for two samples."""
        return (2, *self.shape)


class Survey:
    """All branch points of a model, found in a recording of everything that it does.

    Args:
        model: the recorded model.
        recording: in eval mode, with every module opened that has children.
    """

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.model = model
        self.recording = recording
        self.first_use, self.last_use, self.born, self.dependent = self._dataflow()
        self.stretches = self._parameter_stretches()
        self.end = backbone_end(model, recording)
        self.suitable = {point.name: point for point in map(self._branch_point, recording.spans) if point is not None}

    def _dataflow(self) -> tuple[dict[int, int], dict[int, int], dict[int, int], set[int]]:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        born = {0: -1}
        dependent = {0}
        for i, op in enumerate(self.recording.ops):
            used = refs((op.args, op.kwargs))
            for index in used:
                first.setdefault(index, i)
                last[index] = i
            for index in refs(op.output):
                born[index] = i
                if used & dependent:
                    dependent.add(index)
        for index in refs(self.recording.result):
            last[index] = len(self.recording.ops)
        return first, last, born, dependent

    def _parameter_stretches(self) -> list[tuple[int, int]]:
        """For each module with weights that is used more than once: from its first use to its last. No cut in there."""
        weighted = {name for name, module in self.model.named_modules() if list(module.parameters(recurse=False))}
        called = {str(op.target) for op in self.recording.ops if op.kind == "call_module"}
        uses: dict[str, list[int]] = {}
        for i, op in enumerate(self.recording.ops):
            owner = str(op.target) if op.kind == "call_module" else str(op.target).rpartition(".")[0]
            if op.kind in ("call_module", "get_attr") and owner in weighted & called:
                uses.setdefault(owner, []).append(i)
        return [(min(where), max(where)) for where in uses.values() if len(where) > 1]

    def crossing(self, end: int) -> list[int]:
        """Input-dependent tensors that the first ``end`` operations make and later ones need."""
        return [index for index in sorted(self.dependent) if self.born[index] < end <= self.last_use.get(index, -1)]

    def _branch_point(self, span: Span) -> BranchPoint | None:
        output = span.tensor()
        # One batch-first floating tensor with channels, in front of the backbone's own end.
        if span.name == FORWARD_FEATURES or output is None or not 0 < span.end < self.end:
            return None
        shape = self.recording.shapes[output.index]
        if not self.recording.floating[output.index] or not 2 <= len(shape) <= 4 or shape[0] != 2:
            return None
        if self.recording.span(span.name) is None or any(a < span.end <= b for a, b in self.stretches):
            return None
        crossing = self.crossing(span.end)
        if output.index not in crossing or len(crossing) > MOST_CROSSING:
            return None
        share = span.macs / max(self.recording.macs, 1)
        in_place = output.index in self.recording.changed
        company = self._company(span, [index for index in crossing if index != output.index])
        return BranchPoint(span.name, share, shape[1:], span.end, len(crossing), span.parents, in_place, company)

    def _company(self, span: Span, others: list[int]) -> float:
        """Size of tensors that cross beside a module's output, each as a share of what its unit gives, at most 1."""
        around = [self.recording.span(name) for name in span.parents if name]  # not the model, which gives logits
        units = [span.tensor(), *(unit.tensor() for unit in around if unit)]
        size = min(math.prod(self.recording.shapes[unit.index]) for unit in units if unit)
        return sum(min(1.0, math.prod(self.recording.shapes[index]) / max(size, 1)) for index in others)

    def branch_points(self, without: Collection[str] = ()) -> list[BranchPoint]:
        """One for each distinct amount of compute, in order: with the fewest crossing tensors, then the outermost.

        Args:
            without: modules that cannot be opened; those inside them are left out.
        """
        best: dict[float, BranchPoint] = {}
        for point in sorted(self.suitable.values(), key=lambda p: (p.end, -depth(p))):
            if point.in_place or not 0 < point.share < NOTHING_SAVED:
                continue
            if not {*point.parents, point.name}.isdisjoint(without):
                continue
            module = self.model.get_submodule(point.name)
            # Beside an operation inside a residual unit the shortcut crosses too: only a cell's end may have company.
            if isinstance(module, nn.Identity) or (point.crossing > 1 and next(module.children(), None) is None):
                continue
            rival = best.get(point.share)
            if rival is None or (point.crossing, depth(point)) <= (rival.crossing, depth(rival)):
                best[point.share] = point
        return sorted(best.values(), key=lambda p: p.end)

    def named(self, names: list[str]) -> list[BranchPoint]:
        """The branch points that a user asked for by name.

        Raises:
            ModelError: a name is unknown, unsuitable, given twice or out of order.
        """
        for name in names:
            if name not in self.suitable:
                known = any(name == other for other, _ in self.model.named_modules())
                remedy = nearest(name, self.suitable, "give a number of exits instead", cutoff=0.3)
                why = "no exit can branch off after it" if known else "the backbone has no such module"
                raise ModelError(f"exits: module {name!r}: {why}; {remedy}")
        chosen = [self.suitable[name] for name in names]
        for one, other in itertools.pairwise(chosen):
            if one.end >= other.end:
                raise ModelError(
                    f"exits: {other.name!r} does not come after {one.name!r}; "
                    "name each module once, from input to output"
                )
        return chosen


def backbone_end(model: nn.Module, recording: Recording) -> int:
    """Where the last exit's own part begins: where forward_features returned, or else before the last weights."""
    features = recording.span(FORWARD_FEATURES)
    if features and not features.parents:
        return features.end
    weighted = {name for name, module in model.named_modules() if next(module.parameters(), None) is not None}
    calls = enumerate(recording.ops)
    return max((i for i, op in calls if op.kind == "call_module" and op.target in weighted), default=0)


def depth(point: BranchPoint) -> int:
    """How deeply a module is nested."""
    return point.name.count(".")


def spread(points: list[BranchPoint], exits: int) -> list[BranchPoint]:
    """Choose the early exits of a network of ``exits`` exits: near shares 1/k, 2/k, ... of the compute.

    The least total distance from these shares, where nesting and further crossing tensors count as distance; found by
    dynamic programming over the branch points in order.

    Raises:
        ModelError: there are fewer branch points than early exits.
    """
    early = exits - 1
    if early > len(points):
        raise ModelError(
            f"exits = {exits}: this backbone has {len(points)} branch points; ask for at most {len(points) + 1}"
        )
    # best[j]: least cost of the exits so far when the last one is at one of the first j points, and their indices
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())] * (len(points) + 1)
    for number in range(1, exits):
        row: list[tuple[float, tuple[int, ...]]] = [(float("inf"), ())] * (len(points) + 1)
        for j, point in enumerate(points, start=1):
            cost, indices = best[j - 1]
            here = cost + _cost(point, number / exits)
            row[j] = min(row[j - 1], (here, (*indices, j - 1)), key=lambda entry: entry[0])
        best = row
    return [points[i] for i in best[-1][1]]


def _cost(point: BranchPoint, share: float) -> float:
    return abs(point.share - share) + DEPTH_PENALTY * depth(point) + CROSSING_PENALTY * point.company
