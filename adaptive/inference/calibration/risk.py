"""Risk control: thresholds that lose at most epsilon of the full network's accuracy, with high probability.

Pareto testing (Laufer-Goldshtein et al., ICLR 2023, arXiv 2210.07913) on top of learn-then-test (Angelopoulos et al.,
arXiv 2110.01052), for early exits as in Jazbec et al. (NeurIPS 2024, arXiv 2405.20915).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive.inference.calibration.search import search
from adaptive.inference.calibration.thresholds import Choice, Scored, apply_thresholds
from adaptive.inference.policy import EVERYBODY, NOBODY

CANDIDATES = 40
_BOLDEST = 0.75  # share of the capital that one image may cost


def control(
    family: Scored, tested: Scored, costs: Sequence[float], epsilon: float, delta: float, seed: int = 0
) -> Choice:
    """Return the cheapest thresholds that, by a test, lose at most epsilon of the full network's accuracy.

    The search on ``family`` fixes forty candidates, evenly spaced in cost; `fixed_sequence` tests them on ``tested``.
    Over the draw of ``tested`` the chosen thresholds lose more than epsilon with a probability of at most delta.

    Args:
        family: answers to the images that candidates are found on.
        tested: answers to other images, drawn independently of them.
        costs: of one image up to each exit, strictly rising.
        epsilon: accuracy that may be lost, as a share; 0.01 is one point.
        delta: probability of losing more.
        seed: of the order of the test's images.

    Returns:
        The thresholds, and what they bring on ``tested``.

    Raises:
        PolicyError: the costs are not positive and strictly rising.
    """
    first, last = costs[0], costs[-1]
    budgets = [first + (last - first) * i / CANDIDATES for i in range(CANDIDATES)]
    candidates = search(family, costs, budgets, smooth=True)
    return fixed_sequence(candidates, tested, costs, epsilon, delta, seed)


def fixed_sequence(
    candidates: Sequence[Choice], tested: Scored, costs: Sequence[float], epsilon: float, delta: float, seed: int = 0
) -> Choice:
    """Test candidates from the most expensive to the cheapest and return the last before the first that fails.

    The order is fixed before the test's images are seen, so each may be tested at level delta. Where none passes,
    nobody leaves early, which loses nothing. The arguments are those of `control`.
    """
    thresholds = [NOBODY] * (len(costs) - 1) + [EVERYBODY]
    order = torch.randperm(tested.scores.shape[1], generator=torch.Generator().manual_seed(seed))
    for candidate in sorted(candidates, key=lambda choice: -choice.outcome.cost):
        if p_value(losses(candidate.thresholds, tested, costs)[order], epsilon, delta) > delta:
            break
        thresholds = candidate.thresholds
    return Choice(thresholds, apply_thresholds(torch.tensor(thresholds), tested, costs))


def losses(thresholds: Sequence[float], scored: Scored, costs: Sequence[float]) -> Tensor:
    """Return (N,) float64: 1 where only the full network is right, -1 where only the early answer is, 0 elsewhere."""
    leaves = apply_thresholds(torch.tensor(thresholds), scored, costs).leaves
    early = scored.correct.gather(0, leaves.unsqueeze(0)).squeeze(0)
    return scored.correct[-1].double() - early.double()


def p_value(values: Tensor, epsilon: float, delta: float) -> float:
    """Return a p-value of "the expected loss is above epsilon", valid for any number of images.

    A gambler who bets the share b_t of a capital of 1 against the hypothesis has prod (1 + b_t (epsilon - loss_t))
    after the images so far; if the hypothesis holds and b_t depends on the images before t alone, this is a
    supermartingale, and by Ville's inequality its maximum exceeds 1 / p with a probability of at most p. The bets are
    the predictable plug-ins of Waudby-Smith and Ramdas (JRSS B 2024, arXiv 2010.09686, equation 26), on losses in
    -1..1: sqrt(2 log(1 / delta) / (N variance before t)). Most losses are 0, so their variance is small, and the bets
    profit from that; the Hoeffding-Bentkus bound knows the range only and accepts next to nothing here.

    Args:
        values: (N,) losses in -1..1, in an order that does not depend on them.
        epsilon: above 0, below 1.
        delta: the level that the bets are made for; the p-value is valid at any.
    """
    losses = values.double()
    counts = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    means = losses.cumsum(0) / (counts + 1)
    variances = (0.25 + (losses - means).square().cumsum(0)) / (counts + 1)
    before = torch.cat([torch.full((1,), 0.25, dtype=torch.float64), variances[:-1]])
    bets = (2 * math.log(1 / delta) / (len(losses) * before)).sqrt().clamp(max=_BOLDEST / (1 - epsilon))
    capital = torch.log1p(bets * (epsilon - losses)).cumsum(0).max()
    return math.exp(-max(0.0, float(capital)))
