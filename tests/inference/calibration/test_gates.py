from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.calibration.gates import exit_distribution, fit_gates, gate_inputs
from adaptive.inference.outputs import scores, simulate
from adaptive.inference.policy import FEATURES, Policy
from tests.inference.answers import made_up_logits


def _inputs(images: int = 600, exits: int = 3) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    logits, labels, costs = made_up_logits(exits, images)
    return logits.softmax(-1), labels, costs


def test_exit_distribution_sums_to_one() -> None:
    found = exit_distribution(torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.3, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, 1, 0], [0.25, 0, 0], [0.25, 0, 1]]))


def test_inputs_are_the_features_of_the_policy() -> None:
    probabilities, *_ = _inputs(50, 4)
    found = gate_inputs(probabilities)
    assert found.shape == (3, 50, len(FEATURES))
    answers = probabilities.argmax(-1)
    torch.testing.assert_close(found[0, :, 0], probabilities[0].max(-1).values)
    assert found[0, :, 3:].abs().max() == 0  # nothing came before the first exit
    same = (answers[2] == answers[1]).float() * (1 + (answers[1] == answers[0]).float())
    torch.testing.assert_close(found[2, :, 3], same / 2)
    torch.testing.assert_close(found[2, :, 4], probabilities[1].max(-1).values)
    torch.testing.assert_close(found[2, :, 5], probabilities[:2].max(-1).values.max(0).values)


def test_trained_gates_meet_the_budget_in_expectation() -> None:
    probabilities, labels, costs = _inputs(2000)
    for budget in (1.5, 2.4):
        gates = fit_gates(probabilities, labels, costs, budget)
        policy = Policy(kind="gate", thresholds=[0.5, 0.5, -1e8], gates=gates)
        leaving = exit_distribution(scores(policy, probabilities)[:-1])
        assert float((leaving * torch.tensor(costs).unsqueeze(1)).sum(0).mean()) == pytest.approx(budget, abs=0.15)


def test_gates_are_repeatable_and_leave_the_global_generator_alone() -> None:
    probabilities, labels, costs = _inputs(100)
    before = torch.get_rng_state()
    first = fit_gates(probabilities, labels, costs, 2.0, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    assert fit_gates(probabilities, labels, costs, 2.0, seed=3) == first
    assert fit_gates(probabilities, labels, costs, 2.0, seed=4) != first


def test_constant_inputs_do_not_break_the_normalisation() -> None:
    probabilities = torch.full((3, 20, 4), 0.25)
    gates = fit_gates(probabilities, torch.zeros(20, dtype=torch.long), [1.0, 2.0, 3.0], 2.0)
    policy = Policy(kind="gate", thresholds=[0.5, 0.5, -1e8], gates=gates)
    assert bool(scores(policy, probabilities).isfinite().all())


def test_a_gate_beats_chance_at_the_same_cost() -> None:
    logits, labels, costs = made_up_logits(4, 6000, seed=5)
    budget = 2.2
    policy = fit(logits[:, :3000], labels[:3000], costs, Target(budget=budget), kind="gate")
    assert policy.calibration is not None
    assert policy.calibration.images == 1500  # the gates were trained on the others
    found = simulate(policy, logits[:, 3000:].softmax(-1))
    cost = torch.tensor(costs)[found.exits - 1].mean().item()
    single = 100 * (logits[:, 3000:].argmax(-1) == labels[3000:]).double().mean(1)
    assert cost == pytest.approx(budget, rel=0.05)
    assert found.top1(labels[3000:]) > float(np.interp(cost, costs, single.numpy())) + 2
