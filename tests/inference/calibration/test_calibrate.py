from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from adaptive.errors import ModelError, PolicyError
from adaptive.inference.calibration.calibrate import METHODS, Target, calibrate, curve, fit
from adaptive.inference.calibration.geometric import GeometricCurve
from adaptive.inference.calibration.guarantees.judged import images_of_the_test
from adaptive.inference.calibration.thresholds import Scored
from adaptive.inference.intervals import lower_bound
from adaptive.inference.outputs import Outputs, scores, simulate
from adaptive.inference.policy import Policy
from tests.inference.answers import made_up_logits

KINDS = ("confidence", "margin", "entropy", "patience", "gate")


def _check_record(policy: Policy, logits: torch.Tensor, labels: torch.Tensor, costs: list[float]) -> None:
    """What the record says is what the policy does to these images."""
    record = policy.calibration
    assert record is not None
    found = simulate(policy, Outputs(logits, labels, labels).probabilities(policy))
    assert found.counts(len(costs)) == record.counts
    assert found.top1(labels) == pytest.approx(record.top1)
    assert torch.tensor(costs)[found.exits - 1].double().mean().item() == pytest.approx(record.cost)
    assert (record.images, record.costs) == (len(labels), costs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [k for k in KINDS if k != "gate"])
@pytest.mark.parametrize("temperature", [False, True])
def test_the_record_is_what_the_policy_does(method: str, kind: Any, temperature: bool) -> None:
    logits, labels, costs = made_up_logits(3, 400)
    policy = fit(
        logits,
        labels,
        costs,
        Target(budget=1.8),
        kind=kind,
        method=method,
        temperature=temperature,
        unit="ms",
        split="val",
    )
    _check_record(policy, logits, labels, costs)
    assert policy.calibration is not None
    assert (policy.calibration.method, policy.calibration.unit, policy.calibration.split) == (method, "ms", "val")
    assert policy.calibration.target == {"budget": 1.8}
    assert policy.kind == kind
    assert len(policy.temperatures) == (3 if temperature else 0)
    assert policy.expected_cost <= 1.8
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


def test_calibrate_takes_numpy_and_torch_and_equals_fit() -> None:
    logits, labels, costs = made_up_logits(3, 400)
    probabilities = logits.softmax(-1)
    first = calibrate(probabilities, labels, costs, 2.0)
    assert calibrate(probabilities.numpy(), labels.numpy(), np.array(costs), 2.0) == first
    assert calibrate(probabilities.double().numpy(), labels.int(), costs, 2.0).calibration == first.calibration
    assert fit(logits, labels, costs, Target(budget=2.0)).calibration == first.calibration


@pytest.mark.parametrize("kind", KINDS)
def test_search_is_never_below_geometric_for_any_kind(kind: Any) -> None:
    logits, labels, costs = made_up_logits(4, 500)
    budgets = [1.3, 2.0, 2.9, 3.7]
    geometric, search, maximum = (
        curve(logits, labels, costs, budgets, kind=kind, method=method) for method in ("geometric", "search", "maximum")
    )
    for low, middle, high in zip(geometric, search, maximum, strict=True):
        assert low.gates == middle.gates
        assert low.expected_accuracy <= middle.expected_accuracy <= high.expected_accuracy + 1e-9
    assert [p.calibration.target["budget"] for p in search if p.calibration] == budgets


def test_geometric_between_the_rows() -> None:
    logits, labels, costs = made_up_logits(3, 400)
    policy = calibrate(logits.softmax(-1), labels, costs, 1.777, method="geometric")
    assert 1.75 < policy.expected_cost <= 1.777


@pytest.mark.parametrize("temperature", [False, True])
@pytest.mark.parametrize("kind", ["confidence", "gate"])
def test_target_accuracy_is_reported_by_images_that_chose_nothing(kind: Any, temperature: bool) -> None:
    logits, labels, costs = made_up_logits(3, 1200)
    full = 100 * (logits[-1].argmax(-1) == labels).double().mean().item()
    policy = fit(logits, labels, costs, Target(top1=full - 4), kind=kind, temperature=temperature)
    record = policy.calibration
    assert record is not None
    assert (record.method, record.images, record.confidence) == ("accuracy", 600, 0.95)
    tested = images_of_the_test(1200, 0)
    found = simulate(policy, Outputs(logits[:, tested], labels[tested], tested).probabilities(policy))
    assert found.counts(3) == record.counts
    assert found.top1(labels[tested]) == pytest.approx(record.top1)
    assert record.cost < costs[-1]
    assert record.bound == pytest.approx(lower_bound(round(6 * record.top1), 600))
    with pytest.raises(PolicyError, match=r"top1 99.9 %: the best"):
        fit(logits, labels, costs, Target(top1=99.9))


def test_an_accuracy_with_a_confidence_is_kept_or_said_not_to_be() -> None:
    logits, labels, costs = made_up_logits(3, 2000)
    full = 100 * (logits[-1].argmax(-1) == labels).double().mean().item()
    kept = fit(logits, labels, costs, Target(top1=full - 6, confidence=0.95)).calibration
    assert kept is not None
    assert kept.target == {"top1": full - 6, "confidence": 0.95}
    assert kept.evidence is not None
    assert kept.evidence.shown
    assert kept.bound == full - 6
    assert kept.counts[-1] < 1000
    missed = fit(logits, labels, costs, Target(top1=full - 0.2, confidence=0.95)).calibration
    assert missed is not None
    assert missed.counts == [0, 0, 1000]
    assert missed.evidence is not None
    assert not missed.evidence.shown
    assert "Nobody leaves early" in missed.evidence.words


@pytest.mark.parametrize("kind", ["confidence", "gate"])
def test_target_risk_reports_the_images_of_the_test(kind: Any) -> None:
    logits, labels, costs = made_up_logits(3, 2000)
    policy = fit(logits, labels, costs, Target(epsilon=0.05), kind=kind, temperature=True)
    record = policy.calibration
    assert record is not None
    assert record.target == {"epsilon": 0.05, "delta": 0.1}
    assert record.method == "risk"
    assert record.images == sum(record.counts) == 1000
    assert record.cost < 0.95 * costs[-1]


def test_risk_fits_nothing_on_the_images_of_its_test() -> None:
    logits, labels, costs = made_up_logits(3, 400)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    tested = order[200:]
    spoilt = logits.clone()
    spoilt[:, tested] = -spoilt[:, tested]
    kept, changed = (
        fit(z, labels, costs, Target(epsilon=0.05), kind="gate", temperature=True) for z in (logits, spoilt)
    )
    assert kept.temperatures == changed.temperatures
    assert kept.gates == changed.gates


def test_gate_thresholds_are_chosen_on_images_the_gates_have_not_seen() -> None:
    logits, labels, costs = made_up_logits(3, 400)
    chosen = torch.randperm(400, generator=torch.Generator().manual_seed(0))[200:].sort().values
    policy = fit(logits, labels, costs, Target(budget=2.0), kind="gate")
    probabilities = logits.softmax(-1)
    found = simulate(policy, probabilities[:, chosen])
    assert policy.calibration is not None
    assert found.counts(3) == policy.calibration.counts
    assert scores(policy, probabilities).shape == (3, 400)


def test_geometric_budget_of_patience_uses_its_own_scores() -> None:
    logits, labels, costs = made_up_logits(3, 300)
    policy = fit(logits, labels, costs, Target(budget=2.7), kind="patience", method="geometric")
    assert any(threshold > 1 for threshold in policy.thresholds)


def _call(**changes: Any) -> Policy:
    logits, labels, costs = made_up_logits(3, 30)
    arguments: dict[str, Any] = {"probabilities": logits.softmax(-1), "labels": labels, "costs": costs, "budget": 2.0}
    return calibrate(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "maxprob"}, "kind 'maxprob' is unknown; .*confidence.*gate"),
        ({"method": "grid"}, "method 'grid' is unknown; .*search, geometric"),
        ({"probabilities": torch.rand(3, 30)}, "probabilities: .*shape"),
        ({"probabilities": torch.zeros(3, 0, 5), "labels": torch.zeros(0, dtype=torch.long)}, "0 images"),
        ({"probabilities": torch.full((3, 30, 5), 0.5)}, "give softmax outputs"),
        ({"probabilities": torch.full((3, 30, 5), float("nan"))}, "answer to images 0, 1, 2 and 27 more"),
        ({"probabilities": torch.ones(3, 30, 5, dtype=torch.long)}, "give floats"),
        ({"labels": torch.zeros(29, dtype=torch.long)}, "labels: .*30 whole numbers"),
        ({"labels": torch.zeros(30)}, "labels: torch.float32"),
        ({"labels": torch.full((30,), 5)}, "labels: 5 is none of the 5 classes"),
        ({"labels": torch.full((30,), -1)}, "labels: -1"),
        ({"costs": [1.0, 3.0, 2.0]}, "costs: 1, 3, 2"),
        ({"costs": [1.0, 3.0]}, "costs: 2 for 3 exits"),
        ({"budget": 0.5}, "budget 0.5 MACs: .*between 1 .*and 3 MACs"),
        ({"budget": 3.5}, "give a budget in this range"),
    ],
)
def test_wrong_input_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((PolicyError, ModelError), match=message) as caught:
        _call(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "nothing given"),
        ({"budget": 1.0, "top1": 50.0}, "budget and top1"),
        ({"budget": 1.0, "delta": 0.1}, "delta 0.1 without epsilon"),
        ({"top1": 101.0}, "top1 101"),
        ({"epsilon": 0.0}, "epsilon 0"),
        ({"epsilon": 0.1, "delta": 1.0}, "delta 1"),
        ({"epsilon": 0.1, "confidence": 0.9}, "confidence 0.9 without top1; .*give delta, 1 - confidence"),
        ({"budget": 1.0, "confidence": 0.9}, "confidence 0.9 without top1; .*a mean cost has none"),
        ({"top1": 90.0, "confidence": 1.0}, "confidence 1: has to lie between 0 and 1"),
    ],
)
def test_wrong_targets_are_named(target: dict[str, float], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        Target(**target)


def test_geometric_is_for_a_budget_only() -> None:
    logits, labels, costs = made_up_logits(3, 30)
    with pytest.raises(PolicyError, match="method geometric is for a budget"):
        fit(logits, labels, costs, Target(top1=50.0), method="geometric")
    with pytest.raises(PolicyError, match="budgets: none given"):
        curve(logits, labels, costs, [])


def test_geometric_method_is_the_geometric_curve() -> None:
    logits, labels, costs = made_up_logits(3, 300)
    expected = GeometricCurve(Scored.of(logits.softmax(-1), labels), costs).at(2.1)
    assert calibrate(logits.softmax(-1), labels, costs, 2.1, method="geometric").thresholds == expected.thresholds
