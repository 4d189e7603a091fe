"""Risk control: thresholds that keep a bound on the loss of accuracy, or an accuracy, with high probability.

Pareto testing (Laufer-Goldshtein et al., ICLR 2023, arXiv 2210.07913) on top of learn-then-test (Angelopoulos et al.,
arXiv 2110.01052), for early exits as in Jazbec et al. (NeurIPS 2024, arXiv 2405.20915). Candidates are fixed on some
images and tested on others, one after another in an order that the others had no part in, until one fails. So each may
be tested at the whole level: the first one that should fail stops the sequence with a probability of 1 - delta.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.inference.calibration.geometric import GeometricCurve
from adaptive.inference.calibration.guarantees.exact_test import accuracy_p_value, p_value
from adaptive.inference.calibration.search import search
from adaptive.inference.calibration.thresholds import Choice, Scored, apply_thresholds
from adaptive.inference.policy import EVERYBODY, NOBODY

CANDIDATES = 40
_MANY = 2000  # images from which on the search finds better candidates than the geometric curve has


@dataclass(frozen=True)
class Tested(Choice):
    """The thresholds that a sequence of tests ended at, and what they bring on the images of the test.

    Attributes:
        passed: how many candidates passed; with none nobody leaves early.
        first: outcome on the images of the test of the candidate that was tested first.
    """

    passed: int
    first: Choice


def control(family: Scored, tested: Scored, costs: Sequence[float], epsilon: float, delta: float) -> Tested:
    """Return the cheapest thresholds that, by a test, lose at most epsilon of the full network's accuracy.

    Forty candidates of ``family``, evenly spaced in cost, are tested on ``tested`` by `fixed_sequence`. Over the draw
    of ``tested`` the chosen thresholds lose more than epsilon with a probability of at most delta.

    Args:
        family: answers to the images that candidates are found on.
        tested: answers to other images, drawn independently of them.
        costs: of one image up to each exit, strictly rising.
        epsilon: accuracy that may be lost, as a share; 0.01 is one point.
        delta: probability of losing more.

    Returns:
        The thresholds, and what they bring on ``tested``.

    Raises:
        PolicyError: the costs are not positive and strictly rising.
    """
    return fixed_sequence(candidates(family, costs), tested, costs, epsilon, delta)


def control_accuracy(family: Scored, tested: Scored, costs: Sequence[float], top1: float, confidence: float) -> Tested:
    """Return the cheapest thresholds that, by a test, have an accuracy of at least ``top1``.

    Of the candidates of `control` and the full network those are tested that no cheaper one is as accurate as on
    ``family``, from the most accurate to the cheapest, by the exact binomial test. Over the draw of ``tested`` the
    chosen thresholds are less accurate with a probability of at most 1 - confidence. Where the first one fails nothing
    is shown, and nobody leaves early.

    Args:
        family: answers to the images that candidates are found on.
        tested: answers to other images, drawn independently of them.
        costs: of one image up to each exit, strictly rising.
        top1: accuracy in percent.
        confidence: probability of having it.
    """
    return accuracy_sequence(front(family, costs), tested, costs, top1, confidence)


def front(family: Scored, costs: Sequence[float]) -> list[Choice]:
    """Return the candidates, and the full network, that are more accurate on ``family`` than every cheaper one."""
    found: list[Choice] = []
    every = [*candidates(family, costs), _full(family, costs)]
    for choice in sorted(every, key=lambda choice: (choice.outcome.cost, -choice.outcome.top1)):
        if not found or choice.outcome.top1 > found[-1].outcome.top1:
            found.append(choice)
    return found


def accuracy_sequence(
    family: Sequence[Choice], tested: Scored, costs: Sequence[float], top1: float, confidence: float
) -> Tested:
    """As `fixed_sequence`, for an accuracy: where no candidate passes, nothing is shown of the full network either."""

    def passes(choice: Choice) -> bool:
        images = len(choice.outcome.leaves)
        right = round(choice.outcome.top1 * images / 100)
        return accuracy_p_value(right, images, top1 / 100) <= 1 - confidence

    return _sequence(family, tested, costs, passes)


def candidates(family: Scored, costs: Sequence[float]) -> list[Choice]:
    """Return forty sets of thresholds, evenly spaced in cost from everybody at the first exit to nearly nobody.

    On fewer than 2,000 images they are those of the geometric curve. A search through all thresholds fits chance there:
    its dear candidates, which are tested first, lose more on other images than the curve's, and often end the sequence.
    """
    first, last = costs[0], costs[-1]
    budgets = [first + (last - first) * i / CANDIDATES for i in range(CANDIDATES)]
    if family.scores.shape[1] >= _MANY:
        return search(family, costs, budgets, smooth=True)
    curve = GeometricCurve(family, costs)
    return [curve.at(budget) for budget in budgets]


def fixed_sequence(
    family: Sequence[Choice], tested: Scored, costs: Sequence[float], epsilon: float, delta: float
) -> Tested:
    """Test candidates from the most expensive to the cheapest and return the last before the first that fails.

    The order is fixed before the test's images are seen, so each may be tested at level delta. Where none passes,
    nobody leaves early, which loses nothing. The arguments are those of `control`.
    """

    def passes(choice: Choice) -> bool:
        return p_value(*lost_and_won(choice, tested), tested.scores.shape[1], epsilon) <= delta

    return _sequence(family, tested, costs, passes)


def _sequence(
    family: Sequence[Choice], tested: Scored, costs: Sequence[float], passes: Callable[[Choice], bool]
) -> Tested:
    """Test candidates, given with their outcome on ``family``'s images, by falling cost there, until one fails."""
    reached, count = _full(tested, costs), 0
    first = reached
    for number, candidate in enumerate(sorted(family, key=lambda choice: -choice.outcome.cost)):
        there = Choice(candidate.thresholds, apply_thresholds(torch.tensor(candidate.thresholds), tested, costs))
        first = first if number else there
        if not passes(there):
            break
        reached, count = there, number + 1
    return Tested(reached.thresholds, reached.outcome, count, first)


def _full(scored: Scored, costs: Sequence[float]) -> Choice:
    thresholds = [NOBODY] * (len(costs) - 1) + [EVERYBODY]
    return Choice(thresholds, apply_thresholds(torch.tensor(thresholds), scored, costs))


def losses(thresholds: Sequence[float], scored: Scored, costs: Sequence[float]) -> Tensor:
    """Return (N,) float64: 1 where only the full network is right, -1 where only the early answer is, 0 elsewhere."""
    return _losses(apply_thresholds(torch.tensor(thresholds), scored, costs).leaves, scored)


def lost_and_won(choice: Choice, scored: Scored) -> tuple[int, int]:
    """Return how many images only the full network has right, and how many only the thresholds' answer."""
    values = _losses(choice.outcome.leaves, scored)
    return int((values > 0).sum()), int((values < 0).sum())


def _losses(leaves: Tensor, scored: Scored) -> Tensor:
    early = scored.correct.gather(0, leaves.unsqueeze(0)).squeeze(0)
    return scored.correct[-1].double() - early.double()
