"""One step of the threshold search: try all thresholds of one exit, or of two at once, with the others held.

docs/inference.md works one step of two thresholds through with numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptive.inference.policy import EVERYBODY, NOBODY

_SAME = 1e-9  # differences of keys that rounding makes
_SAMPLE = 1024  # of the images, for quantiles


class Goal:
    """What the search maximises."""

    def key(self, right: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Rank outcomes by the number of right images and their total relative cost; -inf where not allowed."""
        raise NotImplementedError

    def best(self, problem: Problem, cutoffs: list[np.ndarray]) -> np.ndarray:
        """Return the first of the best."""
        keys = [float(self.key(*problem.outcome(c))) for c in cutoffs]
        return cutoffs[int(np.argmax(keys))]


@dataclass(frozen=True)
class MostRight(Goal):
    """Most images right within a total relative cost, then least cost."""

    limit: float
    images: int

    @classmethod
    def of(cls, problem: Problem, budget: float) -> MostRight:
        """For a mean cost of an image."""
        return cls(budget / problem.full * problem.images * (1 + _SAME), problem.images)

    def key(self, right: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Rank outcomes."""
        return np.where(cost <= self.limit, right - 0.5 * cost / self.images, -np.inf)


@dataclass(frozen=True)
class LeastCost(Goal):
    """Least total relative cost with at least a number of images right."""

    wanted: int

    def key(self, right: np.ndarray, cost: np.ndarray) -> np.ndarray:
        """Rank outcomes."""
        return np.where(right > self.wanted - 0.5, -cost, -np.inf)


class Problem:
    """The images, costs and candidate thresholds that the search works on: N images, ranked at each of k exits.

    A threshold is written as a cutoff, a rank: an image leaves at exit i if the rank of its score among the distinct
    scores there, from 0 for the least sure, reaches the cutoff. Costs are relative to the last exit's.
    """

    def __init__(self, scores: np.ndarray, right: np.ndarray, costs: np.ndarray) -> None:
        """From scores (k, N), whether or how probably each exit is right (k, N), and costs (k,)."""
        self.exits, self.images = scores.shape
        self.full = float(costs[-1])
        self.costs = costs / self.full
        self.right = np.ascontiguousarray(right.T, dtype=np.float64).ravel()
        self.values, self.ranks = [], np.zeros((self.exits - 1, self.images), dtype=np.int64)
        for i in range(self.exits - 1):
            values, self.ranks[i] = np.unique(scores[i], return_inverse=True)
            self.values.append(values)

    def cutoffs(self, thresholds: Sequence[float]) -> np.ndarray:
        """Thresholds (k,) on the scores, of single precision -> cutoffs (k-1,)."""
        single = np.asarray(thresholds[:-1], dtype=np.float32)
        return np.array([np.searchsorted(v, t) for v, t in zip(self.values, single, strict=True)], dtype=int)

    def thresholds(self, cutoffs: np.ndarray) -> list[float]:
        """Cutoffs (k-1,) -> thresholds (k,) of single precision, midway between images that get there."""
        found = np.full(self.exits, EVERYBODY, dtype=np.float32)
        here = np.ones(self.images, dtype=bool)
        for i, cutoff in enumerate(cutoffs):
            there = np.flatnonzero(here)
            leaves = self.ranks[i, there] >= cutoff
            if not leaves.any():
                found[i] = NOBODY
            elif not leaves.all():
                lowest = self.values[i][self.ranks[i, there[leaves]].min()]
                highest = self.values[i][self.ranks[i, there[~leaves]].max()]
                middle = np.float32((np.float64(lowest) + np.float64(highest)) / 2)
                found[i] = middle if highest < middle < lowest else lowest
            here[there[leaves]] = False
        return found.tolist()

    def outcome(self, cutoffs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of images right and the total relative cost."""
        right, cost = self._taken(np.arange(self.images), self._leaves(cutoffs)[0])
        return right.sum(), cost.sum()

    def _leaves(self, cutoffs: np.ndarray) -> list[np.ndarray]:
        """For every exit: where each image leaves, (N,) int8, if it gets there."""
        found = [np.full(self.images, self.exits - 1, dtype=np.int8)]
        for i in range(self.exits - 2, -1, -1):
            found.append(np.where(self.ranks[i] >= cutoffs[i], np.int8(i), found[-1]))
        return found[::-1]

    def _taken(self, images: np.ndarray, exits: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """Whether each image is right at its exit, and its cost there."""
        return self.right[images * self.exits + exits], self.costs[exits]

    def _here(self, cutoffs: np.ndarray, i: int) -> np.ndarray:
        """Numbers of the images that get to exit i."""
        gone = np.zeros(self.images, dtype=bool)
        for j in range(i):
            gone |= self.ranks[j] >= cutoffs[j]
        return np.flatnonzero(~gone)

    def move_one(self, goal: Goal, cutoffs: np.ndarray, i: int) -> np.ndarray:
        """Return the cutoffs with exit i's at its best, among all."""
        here, leaves = self._here(cutoffs, i), self._leaves(cutoffs)
        ranks, bins = self.ranks[i, here], len(self.values[i]) + 1
        settled = self._settled(here, leaves, i)
        totals = []
        for base, own, stay in zip(settled, self._taken(here, i), self._taken(here, leaves[i + 1][here]), strict=True):
            totals.append(base + stay.sum() + _from_above(np.bincount(ranks, own - stay, bins)))
        keys = goal.key(*totals)
        best, now = int(np.argmax(keys)), min(int(cutoffs[i]), bins - 1)
        return _moved(cutoffs, (i, best)) if keys[best] > keys[now] + _SAME else cutoffs

    def _settled(self, here: np.ndarray, leaves: list[np.ndarray], i: int) -> tuple[float, float]:
        """Right and cost of the images that leave before exit i."""
        every = self._taken(np.arange(self.images), leaves[0])
        rest = self._taken(here, leaves[i][here])
        return float(every[0].sum() - rest[0].sum()), float(every[1].sum() - rest[1].sum())

    def move_pairs(self, goal: Goal, cutoffs: np.ndarray, i: int, grid: int, window: int) -> np.ndarray:
        """Return the cutoffs after moving exit i's with that of each later exit, on a grid within a window."""
        here, leaves = self._here(cutoffs, i), self._leaves(cutoffs)
        settled = self._settled(here, leaves, i)
        for j in range(i + 1, self.exits - 1):
            found = self._move_pair(goal, cutoffs, (i, j), here, leaves, settled, (grid, window))
            if found is not cutoffs:
                cutoffs, leaves = found, self._leaves(found)
        return cutoffs

    def _move_pair(
        self,
        goal: Goal,
        cutoffs: np.ndarray,
        pair: tuple[int, int],
        here: np.ndarray,
        leaves: list[np.ndarray],
        settled: tuple[float, float],
        resolution: tuple[int, int],
    ) -> np.ndarray:
        """Tabulate right and cost for all candidates of two exits; take the best.

        Three kinds of images get to exit i. Those that some exit between i and j lets go, unless i does: their gain
        from leaving at i is a histogram over i's candidates. The others leave at i, else at j, else later: one more
        histogram for i, and one over both for the gain from leaving at j of those that stay at i.

        An example, the number right of three images at two early exits and the end:

            image   rank at i   rank at j   right at i, j, end
            a           0           2            0  1  1
            b           1           1            0  0  1
            c           2           0            1  1  1

        All three leave at the end: 3 right. Leaving at i changes that by -1, -1 and 0; summed from the surest down, a
        cutoff of 0, 1, 2 or 3 at i brings -2, -1, 0 or 0. Leaving at j changes it by 0, -1 and 0 for those that stay at
        i: with the cutoff 2 at i, a and b stay, and a cutoff of 0, 1, 2 or 3 at j brings -1, -1, 0 or 0. So the pair
        (2, 2) keeps 3 right, and lets c leave at i and a at j; costs are added up the same way.
        """
        i, j = pair
        between = leaves[i + 1][here] < j
        reach = np.flatnonzero(~between)
        at_j = here[reach]
        first, second = self.ranks[i, here], self.ranks[j, at_j]
        tries = [_candidates(r, int(cutoffs[e]), *resolution, self.images) for r, e in ((first, i), (second, j))]
        bins_i, bins_j = (_bins(r, t, self.images) for r, t in zip((first, second), tries, strict=True))
        sizes = len(tries[0]) + 1, len(tries[1]) + 1
        cells = bins_i[reach] * sizes[1] + bins_j
        otherwise = np.where(between, leaves[i + 1][here], leaves[j + 1][here])
        totals = []
        for base, own_i, own_j, stay in zip(
            settled, self._taken(here, i), self._taken(at_j, j), self._taken(here, otherwise), strict=True
        ):
            gain_i = _from_above(np.bincount(bins_i, own_i - stay, sizes[0]))[1:]
            gain_j = np.bincount(cells, own_j - stay[reach], sizes[0] * sizes[1]).reshape(sizes)
            gain_j = _from_above(gain_j.cumsum(axis=0), axis=1)[:-1, 1:]
            totals.append(base + stay.sum() + gain_i[:, None] + gain_j)
        keys = goal.key(*totals)
        now = keys[tuple(np.searchsorted(t, cutoffs[e]) for t, e in zip(tries, pair, strict=True))]
        best = np.unravel_index(int(np.argmax(keys)), keys.shape)
        if keys[best] <= now + _SAME:
            return cutoffs
        return _moved(cutoffs, (i, int(tries[0][best[0]])), (j, int(tries[1][best[1]])))


def _moved(cutoffs: np.ndarray, *moves: tuple[int, int]) -> np.ndarray:
    found = cutoffs.copy()
    for exit_number, cutoff in moves:
        found[exit_number] = cutoff
    return found


def _from_above(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Sum from each entry to the end."""
    return np.flip(np.flip(values, axis).cumsum(axis), axis)


def _candidates(ranks: np.ndarray, cutoff: int, grid: int, window: int, images: int) -> np.ndarray:
    """Cutoffs to try, rising: everybody, nobody, the present one, and up to ``grid`` quantiles of ranks near it."""
    if window < images:  # finer than the present grid, around the present one
        ranks = ranks[np.abs(ranks - cutoff) <= window]
    if len(ranks) > max(_SAMPLE, grid):
        ranks = ranks[:: len(ranks) // _SAMPLE]
    distinct = _distinct(ranks)
    if len(distinct) > grid:
        distinct = distinct[np.linspace(0, len(distinct) - 1, grid).round().astype(int)]
    return _distinct(np.append(distinct, [0, cutoff, images]))


def _distinct(numbers: np.ndarray) -> np.ndarray:
    """Distinct numbers, rising; for so few of them faster than numpy's own, which hashes."""
    ordered = np.sort(numbers)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def _bins(ranks: np.ndarray, candidates: np.ndarray, images: int) -> np.ndarray:
    """How many of the candidates each rank reaches."""
    edges = np.concatenate([[0], candidates, [images]])
    return np.repeat(np.arange(len(edges) - 1), np.diff(edges))[ranks]
