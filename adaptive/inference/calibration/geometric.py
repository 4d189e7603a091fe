"""The classic, geometric calibration of MSDNet's budgeted batch classification.

It lets a share of the images proportional to q^i leave at exit i (Huang et al., ICLR 2018, arXiv 1703.09844, and the
code of arXiv 1908.06294); one number q, small for early and large for late exits, spans a curve of accuracy against
average cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.inference.calibration.thresholds import (
    SLACK,
    Choice,
    Outcome,
    Scored,
    apply_thresholds,
    check_budget,
    check_costs,
)
from adaptive.inference.policy import EVERYBODY, NOBODY

CLASSIC_SWEEP = tuple(p / 20 for p in range(1, 41))  # the values of q in the authors' code
_EXTREME = 1e9  # a ratio at which all images leave at one end, in single precision


@dataclass(frozen=True)
class GeometricPoint:
    """Thresholds chosen for one q, the shares they aim at, and their outcome on the images they were chosen on."""

    q: float
    shares: Tensor
    thresholds: Tensor
    expected: Outcome

    @property
    def choice(self) -> Choice:
        """The thresholds and their outcome alone."""
        return Choice(self.thresholds.tolist(), self.expected)


def geometric_shares(q: float, exits: int) -> Tensor:
    """Return the share of images that exit i = 1..k is to take, q^i / sum of q^j: (k,) float32.

    In single precision and through the logarithm, as the authors' code has it: the floor of a share times N may depend
    on the last bit.
    """
    if not q > 0:
        raise ValueError(f"q = {q}: the ratio of two exits' shares is positive")
    if exits * math.log(q) > math.log(torch.finfo(torch.float32).max) - 1:  # the powers would overflow
        return geometric_shares(1 / q, exits).flip(0)
    powers = torch.exp(torch.log(torch.tensor([q], dtype=torch.float32)) * torch.arange(1, exits + 1))
    return powers / powers.sum()


def geometric_thresholds(scores: Tensor, q: float) -> Tensor:
    """Return one threshold per exit, (k,) in the type of ``scores``, for shares proportional to q^i.

    Exit i's threshold is the score of the floor(N * share)-th surest image among those still there; all that reach it
    leave, ties together. Where that is no image, nobody leaves (``NOBODY``); at the last exit everybody does.

    Args:
        scores: (k, N) of held-out images, through the test-time transform.
        q: above 0; below 1 most images leave early.
    """
    exits, images = scores.shape
    wanted = [int(count) for count in torch.floor(images * geometric_shares(q, exits))]
    thresholds = torch.full((exits,), NOBODY, dtype=scores.dtype, device=scores.device)
    thresholds[-1] = EVERYBODY
    here = torch.ones(images, dtype=torch.bool, device=scores.device)
    for i in range(exits - 1):
        left = scores[i][here]
        if 1 <= wanted[i] <= len(left):
            thresholds[i] = left.kthvalue(len(left) - wanted[i] + 1).values
        here &= scores[i] < thresholds[i]
    return thresholds


def at_ratio(scored: Scored, costs: Sequence[float], q: float) -> GeometricPoint:
    """Choose thresholds for one q on held-out images, and their outcome there."""
    thresholds = geometric_thresholds(scored.scores, q)
    shares = geometric_shares(q, len(thresholds))
    return GeometricPoint(q, shares, thresholds, apply_thresholds(thresholds, scored, costs))


def sweep(scored: Scored, costs: Sequence[float], qs: Sequence[float] = CLASSIC_SWEEP) -> list[GeometricPoint]:
    """Calibrate for every q: the points of a budgeted curve, cheapest first."""
    return [at_ratio(scored, costs, q) for q in qs]


class GeometricCurve:
    """Accuracy against cost of the geometric calibration: the classic sweep's forty rows, and any budget between them.

    Raises:
        PolicyError: the costs are not positive and strictly rising.
    """

    def __init__(self, scored: Scored, costs: Sequence[float]) -> None:
        check_costs(costs, len(scored.scores))
        self.scored = scored
        self.costs = costs
        self.rows = sweep(scored, costs)
        never = [NOBODY] * (len(costs) - 1)
        self.all_early = self._fixed([EVERYBODY, *never[1:], EVERYBODY] if never else [EVERYBODY])
        self.all_late = self._fixed([*never, EVERYBODY])

    def _fixed(self, thresholds: list[float]) -> Choice:
        return Choice(thresholds, apply_thresholds(torch.tensor(thresholds), self.scored, self.costs))

    def at(self, budget: float) -> Choice:
        """Choose the classic calibration's thresholds for a mean cost of an image, in the unit of the costs.

        A budget that is the mean cost of a row of the classic sweep on these images (within 1e-9, relative) gives
        exactly that row. Between rows, and below q = 1/20 and above 2, q is bisected for the highest mean cost within
        the budget (to 1e-4 of the range of costs); at the very ends everybody leaves at the first exit, or nobody
        before the last.

        Raises:
            PolicyError: the budget is cheaper than the first exit or dearer than the last.
        """
        check_budget(budget, self.costs)
        for row in self.rows:
            if math.isclose(row.expected.cost, budget, rel_tol=SLACK):
                return row.choice
        limit = budget * (1 + SLACK)
        if self.costs[-1] <= limit:
            return self.all_late
        low, high, best = 1 / _EXTREME, _EXTREME, self.all_early
        for row in self.rows:  # the last row within the budget and the one after it
            if row.expected.cost > limit:
                high = row.q
                break
            low, best = row.q, max(best, row.choice, key=_cost)
        near = limit - 1e-4 * (self.costs[-1] - self.costs[0])  # closer than this no budget is meant
        while _cost(best) < near and high > low * (1 + 1e-7) and self._wanted(low) != self._wanted(high):
            middle = math.sqrt(low * high)
            found = at_ratio(self.scored, self.costs, middle).choice
            if found.outcome.cost > limit:
                high = middle
            else:
                low, best = middle, max(best, found, key=_cost)
        return best

    def _wanted(self, q: float) -> list[float]:
        return torch.floor(self.scored.scores.shape[1] * geometric_shares(q, len(self.costs))).tolist()


def _cost(choice: Choice) -> float:
    return choice.outcome.cost
