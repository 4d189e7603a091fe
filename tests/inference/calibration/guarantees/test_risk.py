from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom

from adaptive.inference.calibration.guarantees.risk import control, control_accuracy, fixed_sequence, losses
from adaptive.inference.calibration.search import search
from adaptive.inference.calibration.thresholds import Scored, apply_thresholds
from tests.inference.answers import made_up

COSTS = [1.0, 2.0, 3.0, 4.0]


def _at_most(violations: int, draws: int, delta: float) -> bool:
    """Whether so many violations are compatible with a probability of delta, at the level 0.001."""
    return bool(binom.sf(violations - 1, draws, delta) > 0.001)


def test_losses_count_who_is_right_where() -> None:
    correct = torch.tensor([[True, False, True, False], [True, True, False, False]])
    scored = Scored(torch.tensor([[0.9, 0.9, 0.9, 0.1], [0.9, 0.9, 0.9, 0.9]]), correct)
    assert losses([0.5, -1e8], scored, [1.0, 2.0]).tolist() == [0, 1, -1, 0]


def _true_loss(thresholds: list[float], pool: Scored) -> float:
    return float(losses(thresholds, pool, COSTS).mean())


@pytest.mark.parametrize(("epsilon", "delta"), [(0.02, 0.2), (0.05, 0.1)])
def test_the_loss_exceeds_epsilon_as_rarely_as_promised(epsilon: float, delta: float) -> None:
    pool, draws, images = made_up(4, 40_000, 1), 100, 1000
    family = pool.subset(torch.arange(2000))
    budgets = np.linspace(1, 4, 20, endpoint=False).tolist()
    candidates = search(family, COSTS, budgets, smooth=True)
    population = pool.subset(torch.arange(2000, 40_000))
    true = {tuple(c.thresholds): _true_loss(c.thresholds, population) for c in candidates}
    assert max(true.values()) > 2 * epsilon  # there is something to refuse
    generator, violations, costs = torch.Generator().manual_seed(2), 0, []
    for _ in range(draws):
        tested = population.subset(torch.randperm(38_000, generator=generator)[:images])
        found = fixed_sequence(candidates, tested, COSTS, epsilon, delta)
        violations += true.get(tuple(found.thresholds), 0.0) > epsilon
        costs.append(found.outcome.cost)
    assert _at_most(violations, draws, delta)
    assert np.mean(costs) < 0.97 * COSTS[-1]  # and something to accept
    assert len(set(costs)) > 1


def test_a_test_that_ignores_chance_would_be_caught() -> None:
    """The check above fails for the rule "accept what loses at most epsilon on the images at hand"."""
    pool, epsilon, delta, draws = made_up(4, 40_000, 1), 0.02, 0.2, 60
    candidates = search(pool.subset(torch.arange(2000)), COSTS, np.linspace(1, 4, 20).tolist(), smooth=True)
    true = [_true_loss(c.thresholds, pool) for c in candidates]
    generator, violations = torch.Generator().manual_seed(2), 0
    for _ in range(draws):
        tested = pool.subset(torch.randperm(40_000, generator=generator)[:1000])
        passing = [i for i, c in enumerate(candidates) if float(losses(c.thresholds, tested, COSTS).mean()) <= epsilon]
        violations += true[min(passing)] > epsilon
    assert not _at_most(violations, draws, delta)


def test_whole_procedure_on_repeated_splits() -> None:
    pool, draws, violations, costs = made_up(3, 30_000, 3), 5, 0, []
    prices = [1.0, 2.0, 4.0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        images = torch.randperm(30_000, generator=generator)[:1600]
        found = control(pool.subset(images[:800]), pool.subset(images[800:]), prices, 0.05, 0.2)
        violations += float(losses(found.thresholds, pool, prices).mean()) > 0.05
        costs.append(found.outcome.cost)
    assert _at_most(violations, draws, 0.2)
    assert np.mean(costs) < 0.9 * prices[-1]


def test_nobody_leaves_early_where_nothing_can_be_shown() -> None:
    scored = made_up(4, 40, 0)
    found = control(scored.subset(torch.arange(20)), scored.subset(torch.arange(20, 40)), COSTS, 0.001, 0.05)
    assert found.outcome.counts == [0, 0, 0, 20]
    again = apply_thresholds(torch.tensor(found.thresholds), scored, COSTS)
    assert again.counts == [0, 0, 0, 40]
    assert found.passed == 0


def test_the_full_network_may_miss_an_accuracy_that_an_earlier_exit_keeps() -> None:
    """Whoever overthinks is no reason to stop: the sequence starts at the most accurate candidate."""
    generator = torch.Generator().manual_seed(0)
    correct = torch.rand(2, 2000, generator=generator) < torch.tensor([[0.97], [0.90]])
    scored = Scored(torch.full((2, 2000), 0.9), correct)
    found = control_accuracy(
        scored.subset(torch.arange(1000)), scored.subset(torch.arange(1000, 2000)), [1.0, 2.0], 95.0, 0.95
    )
    assert found.passed
    assert found.outcome.counts == [1000, 0]
