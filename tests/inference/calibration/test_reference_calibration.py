"""The geometric calibration against thresholds, counts, accuracies and costs measured on its authors' code."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from adaptive.inference.calibration.calibrate import calibrate
from adaptive.inference.calibration.geometric import (
    CLASSIC_SWEEP,
    at_ratio,
    geometric_shares,
    geometric_thresholds,
    sweep,
)
from adaptive.inference.calibration.thresholds import Scored, apply_thresholds
from adaptive.inference.policy import NOBODY
from tests.networks.reference import FOLDER

HOW = "set ADAPTIVE_REFERENCE to the folder of the reference numbers"
needs_reference = pytest.mark.skipif(
    not (FOLDER / "calibration.json").is_file(), reason=f"no {FOLDER}/calibration.json: {HOW}"
)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads((FOLDER / "calibration.json").read_text())


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return dict(np.load(FOLDER / "calibration_input.npz"))


@pytest.fixture(scope="module")
def sets(arrays: dict[str, np.ndarray]) -> dict[str, Scored]:
    return {
        split: Scored.of(torch.from_numpy(arrays[f"{split}_pred"]), torch.from_numpy(arrays[f"{split}_target"]))
        for split in ("val", "test")
    }


@needs_reference
@pytest.mark.parametrize("p", range(1, 41))
def test_reference_calibration(p: int, expected: dict[str, Any], sets: dict[str, Scored]) -> None:
    row = expected["rows"][p - 1]
    assert row["p"] == p
    found = at_ratio(sets["val"], expected["flops"], p / 20)
    test = apply_thresholds(found.thresholds, sets["test"], expected["flops"])
    # A last bit of a share may differ between machines (exp); nothing that follows may.
    torch.testing.assert_close(found.shares, torch.tensor(row["probs"]), rtol=1e-6, atol=0)
    assert found.thresholds.tolist() == row["thresholds"]
    for split, outcome in (("val", found.expected), ("test", test)):
        assert outcome.counts == row[f"{split}_exit_counts"]
        assert outcome.top1 == pytest.approx(row[f"{split}_acc"], rel=1e-6)
        assert outcome.cost == pytest.approx(row[f"{split}_expected_flops_float64_from_counts"], rel=1e-9)
        assert outcome.cost == pytest.approx(row[f"{split}_expected_flops"], rel=1e-6)  # float32


@needs_reference
@pytest.mark.parametrize("p", range(1, 41))
def test_reference_calibrate_at_a_rows_budget_is_the_row(
    p: int, expected: dict[str, Any], arrays: dict[str, np.ndarray]
) -> None:
    row = expected["rows"][p - 1]
    budget = row["val_expected_flops_float64_from_counts"]
    policy = calibrate(arrays["val_pred"], arrays["val_target"], expected["flops"], budget, method="geometric")
    assert policy.thresholds == row["thresholds"]
    assert policy.calibration is not None
    assert policy.calibration.counts == row["val_exit_counts"]
    assert policy.expected_accuracy == pytest.approx(row["val_acc"], rel=1e-6)
    assert policy.expected_cost == pytest.approx(budget, rel=1e-9)


@needs_reference
def test_reference_accuracy_of_every_exit(expected: dict[str, Any], sets: dict[str, Scored]) -> None:
    for split, answers in sets.items():
        top1 = 100 * answers.correct.double().mean(dim=1)
        torch.testing.assert_close(top1, torch.tensor(expected["per_exit"][f"{split}_acc"]).double())


@needs_reference
def test_reference_sweep_is_the_forty_budgets(expected: dict[str, Any], sets: dict[str, Scored]) -> None:
    found = sweep(sets["val"], expected["flops"])
    assert [entry.q for entry in found] == list(CLASSIC_SWEEP) == [row["p_float"] for row in expected["rows"]]
    assert [entry.thresholds.tolist() for entry in found] == [row["thresholds"] for row in expected["rows"]]


def _by_walking(confidence: torch.Tensor, q: float) -> list[float]:
    """The rule sample by sample, as it is written down."""
    exits, samples = confidence.shape
    gone, thresholds = set(), []
    for i in range(exits - 1):
        wanted, threshold, passed = int(samples * geometric_shares(q, exits)[i]), NOBODY, 0
        for sample in confidence[i].argsort(descending=True).tolist():
            passed += sample not in gone
            if sample not in gone and passed == wanted:
                threshold = confidence[i, sample].item()
                break
        gone |= {s for s in range(samples) if confidence[i, s] >= threshold}
        thresholds.append(threshold)
    return [*thresholds, -NOBODY]


@pytest.mark.parametrize("q", [0.05, 0.3, 1.0, 2.0])
def test_ties_leave_together(q: float) -> None:
    # Confidences of one decimal: nearly all are tied, and early exits take more samples than their share.
    confidence = torch.randint(1, 11, (4, 60), generator=torch.Generator().manual_seed(3)) / 10
    assert geometric_thresholds(confidence, q).tolist() == _by_walking(confidence, q)


def test_nobody_leaves_where_the_share_is_below_one_sample() -> None:
    answers = Scored(torch.rand(3, 8, generator=torch.Generator().manual_seed(0)), torch.ones(3, 8, dtype=torch.bool))
    found = at_ratio(answers, [1.0, 2.0, 4.0], 0.05)
    assert found.thresholds[1] == NOBODY
    assert found.expected.counts[1] == 0
    assert sum(found.expected.counts) == 8
    assert found.expected.leaves.bincount(minlength=3).tolist() == found.expected.counts


def test_thresholds_that_keep_images_for_ever_are_refused() -> None:
    answers = Scored(torch.full((2, 3), 0.5), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="never leave"):
        apply_thresholds(torch.tensor([0.9, 0.9]), answers, [1.0, 2.0])
    with pytest.raises(ValueError, match="q = 0"):
        geometric_shares(0, 3)
