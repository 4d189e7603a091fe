"""The search over all exits' thresholds: best held-out accuracy within an average cost, or least cost for an accuracy.

The classic calibration is one curve through a (k-1)-dimensional space of thresholds; the search starts on it and takes
improvements only. One threshold alone can hardly move along a budget: letting more images leave at one exit has to pay
for letting fewer leave at another. So thresholds are moved in pairs: with the others held, two-dimensional histograms
over candidate thresholds, summed up from the sure end, give the number right and the cost of all pairs at once. Around
the best pair the candidates get finer, down to single images; moves of one threshold at full resolution end it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from adaptive.errors import PolicyError
from adaptive.inference.calibration.geometric import GeometricCurve
from adaptive.inference.calibration.search_moves import Goal, LeastCost, MostRight, Problem
from adaptive.inference.calibration.smoothing import expected_correctness
from adaptive.inference.calibration.thresholds import Choice, Scored, apply_thresholds

EXACT = 256  # so many images or fewer are all candidates
_GRID = 48
_SAMPLE = 4096  # images that the coarse part of the search looks at
_SWEEPS = 3  # through all pairs at one resolution, at most
_STEPS = 12  # budgets that are tried on the way to the cheapest policy of an accuracy


def search(scored: Scored, costs: Sequence[float], budgets: Sequence[float], *, smooth: bool = False) -> list[Choice]:
    """Choose thresholds for the most images right within each mean cost, and among those for the least cost.

    Never below the geometric calibration of the same budget on the same images. With two exits, or three and at most
    256 images, nothing better exists; with more it is a local optimum under exchanges between any two exits.

    The maximum over many thresholds also fits chance: on a few thousand images it can promise a point more than it
    keeps. With ``smooth`` (three exits or more, more than 256 images) an image counts not as right or wrong but by
    the probability that an exit is right, given all its scores, as a logistic regression on the same images says
    (`expected_correctness`); and the geometric calibration stays where the images in fact right are not more by at
    least one standard error of the paired difference.

    Args:
        scored: the answers of k exits to N held-out images.
        costs: of one image up to each exit, strictly rising.
        budgets: mean cost of an image, in the unit of ``costs``; in any order, each in the range of ``costs``.
        smooth: maximise the expected instead of the observed number of images right.

    Returns:
        One choice per budget, with the observed accuracy. Each threshold lies in the middle between the last score that
        leaves and the first that stays, so that the last bit of a score decides nothing.

    Raises:
        PolicyError: the costs are not positive and strictly rising, or a budget lies outside of them.
    """
    curve = GeometricCurve(scored, costs)
    smooth = smooth and len(costs) > 2 and scored.scores.shape[1] > EXACT
    right = expected_correctness(scored) if smooth else scored.correct.numpy()
    space = _Space(scored.scores.numpy(), right, costs, [row.choice.thresholds for row in curve.rows])
    found: dict[float, Choice] = {}
    previous: list[list[float]] = []
    for budget in sorted(set(budgets)):
        geometric = curve.at(budget)
        thresholds = space.best(budget, geometric.thresholds, previous)
        choice = Choice(thresholds, apply_thresholds(torch.tensor(thresholds), scored, costs))
        found[budget] = geometric if smooth and not _better(choice, geometric, scored) else choice
        previous = [thresholds]
    return [found[budget] for budget in budgets]


def cheapest(scored: Scored, costs: Sequence[float], top1: float) -> Choice:
    """Choose thresholds for the least mean cost at an accuracy.

    Args:
        scored: the answers of k exits to N held-out images.
        costs: of one image up to each exit, strictly rising.
        top1: accuracy in percent, at least.

    Raises:
        PolicyError: no thresholds found reach the accuracy; the message names the best that was found.
    """
    choices = search(scored, costs, np.linspace(costs[0], costs[-1], _STEPS).tolist())
    images = scored.scores.shape[1]
    wanted = math.ceil(images * top1 / 100 * (1 - 1e-12))
    within = [choice for choice in choices if choice.outcome.top1 * images / 100 > wanted - 0.5]
    if not within:
        best = max(choices, key=lambda choice: choice.outcome.top1).outcome
        raise PolicyError(
            f"top1 {top1:g} %: the best that thresholds reach on these {images:,} images is {best.top1:.2f} % at a "
            f"mean cost of {best.cost:g}; ask for at most that"
        )
    problem = Problem(scored.scores.numpy(), scored.correct.numpy(), np.asarray(costs, dtype=np.float64))
    goal = LeastCost(wanted)
    within.sort(key=lambda choice: choice.outcome.cost)
    ends = [_refine(problem, goal, problem.cutoffs(choice.thresholds), problem.images) for choice in within[:2]]
    thresholds = problem.thresholds(goal.best(problem, ends))
    return Choice(thresholds, apply_thresholds(torch.tensor(thresholds), scored, costs))


def _better(choice: Choice, other: Choice, scored: Scored) -> bool:
    """Whether more images are right by at least one standard error of the paired difference."""
    right = [scored.correct.gather(0, c.outcome.leaves.unsqueeze(0))[0].double() for c in (choice, other)]
    gain = right[0] - right[1]
    return float(gain.mean()) > float(gain.std()) / math.sqrt(len(gain))


class _Space:
    """Where the search looks: all images, a sample of them for its coarse part, the classic rows as starts."""

    def __init__(self, scores: np.ndarray, right: np.ndarray, costs: Sequence[float], rows: list[list[float]]) -> None:
        prices = np.asarray(costs, dtype=np.float64)
        step = -(-scores.shape[1] // _SAMPLE)
        self.every = Problem(scores, right, prices)
        self.sample = self.every if step == 1 else Problem(scores[:, ::step], right[:, ::step], prices)
        self.rows = rows
        self.outcomes = [self.every.outcome(self.every.cutoffs(row)) for row in rows]

    def best(self, budget: float, geometric: list[float], previous: list[list[float]]) -> list[float]:
        """Return thresholds (k,) for a budget, not below the geometric ones nor any row within the budget."""
        goal = MostRight.of(self.every, budget)
        row = self.rows[int(np.argmax([float(goal.key(*outcome)) for outcome in self.outcomes]))]
        starts = [geometric, *previous, row]
        coarse_goal = MostRight.of(self.sample, budget)
        ends = [_exchange(self.sample, coarse_goal, self.sample.cutoffs(start), self.sample.images) for start in starts]
        coarse = self.sample.thresholds(coarse_goal.best(self.sample, ends))
        cutoffs = self.every.cutoffs(coarse)
        if self.sample is self.every:
            found = _refine(self.every, goal, cutoffs, self.every.images)
        else:  # once through what the sample cannot tell apart
            found = _exchange(self.every, goal, cutoffs, 2 * self.every.images // _GRID, sweeps=1)
        return self.every.thresholds(goal.best(self.every, [*map(self.every.cutoffs, starts), found]))


def _refine(problem: Problem, goal: Goal, cutoffs: np.ndarray, window: int) -> np.ndarray:
    """Improve cutoffs with ever finer candidates, down to single images."""
    while True:
        cutoffs = _exchange(problem, goal, cutoffs, window)
        if window <= _GRID // 2 or problem.images <= EXACT:
            return cutoffs
        window = max(_GRID // 2, 4 * window // _GRID)


def _exchange(problem: Problem, goal: Goal, cutoffs: np.ndarray, window: int, sweeps: int = _SWEEPS) -> np.ndarray:
    """Move pairs of thresholds on a grid within a window around them, then single ones, until nothing improves."""
    grid = EXACT if problem.images <= EXACT else _GRID
    for _ in range(sweeps):
        before = cutoffs
        for i in range(problem.exits - 2):
            cutoffs = problem.move_pairs(goal, cutoffs, i, grid, window)
        for i in range(problem.exits - 1):
            cutoffs = problem.move_one(goal, cutoffs, i)
        if (cutoffs == before).all():
            break
    return cutoffs
