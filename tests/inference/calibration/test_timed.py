"""Thresholds for milliseconds: within the budget by the model, however the prices bend."""

import numpy as np
import pytest
import torch

from adaptive.errors import PolicyError
from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.measuring.time_model import Asked, TimeModel
from adaptive.inference.outputs import simulate
from adaptive.inference.policy import Policy
from adaptive.inference.policy_kinds import Kind
from tests.inference.measuring.test_time_model import model


def answers(images: int = 120, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (3, N, 10) of exits that get better, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (images,), generator=generator)
    hard = torch.rand(images, 1, generator=generator)
    right = torch.nn.functional.one_hot(labels, 10).float()
    noise = torch.randn(3, images, 10, generator=generator)
    strength = torch.tensor([2.5, 3.5, 5.0]).reshape(3, 1, 1)
    return strength * right * (1.3 - hard) + noise, labels


def spent(policy: Policy, found: TimeModel, logits: torch.Tensor) -> float:
    exits = simulate(policy, [policy.probabilities(i, values) for i, values in enumerate(logits)]).counts(3)
    return found.mean([count / sum(exits) for count in exits], Asked.of_policy(policy))


@pytest.mark.parametrize(
    ("batch", "kind", "part"), [(1, "confidence", 0.5), (16, "patience", 0.02), (16, "confidence", 0.9)]
)
def test_the_budget_is_kept_by_the_model(batch: int, kind: Kind, part: float) -> None:
    logits, labels = answers()
    found = model(batch, [1] if batch == 1 else [1, 2, 4, 8, 12, 16])
    low, high = found.exits[0], found.mean([0, 0, 1], Asked([False, False, True], *[[False, False, True]] * 2))
    budget = low + part * (high - low)
    policy = fit(logits, labels, found, Target(budget=budget), kind=kind)
    assert spent(policy, found, logits) <= budget * (1 + 1e-9)
    calibration = policy.calibration
    assert calibration is not None
    assert calibration.unit == "ms"
    assert calibration.timing == found.conditions
    assert calibration.cost == pytest.approx(spent(policy, found, logits))
    assert calibration.cost == pytest.approx(np.dot(calibration.costs, calibration.counts) / calibration.images)


def test_the_budget_is_used() -> None:
    """What a batch of sixteen saves is less than its shares say, and what is left of a budget buys accuracy."""
    logits, labels = answers(300)
    found = model()
    budgets = np.linspace(found.exits[0] * 1.05, found.exits[2] * 0.9, 3)
    policies = [fit(logits, labels, found, Target(budget=float(budget))) for budget in budgets]
    costs = [spent(policy, found, logits) for policy in policies]
    assert all(0.9 * budget <= cost for budget, cost in zip(budgets[:2], costs[:2], strict=True))
    right = [policy.expected_accuracy for policy in policies]
    assert right[0] + 5 < right[-1]
    assert right == sorted(right)


@pytest.mark.parametrize("factor", [0.5, 2])
def test_a_budget_out_of_range_is_told_the_model_s_range(factor: float) -> None:
    logits, labels = answers(50)
    found = model()
    budget = found.exits[0] * 0.9 if factor < 1 else found.exits[-1] * 1.1
    with pytest.raises(PolicyError, match=rf"budget {budget:.4g} ms: .* {found.exits[0]:.4g} ms \(all leave at exit 1"):
        fit(logits, labels, found, Target(budget=budget))


def test_time_is_for_budgets() -> None:
    logits, labels = answers(50)
    with pytest.raises(PolicyError, match="model of time is for a budget"):
        fit(logits, labels, model(), Target(top1=50))
