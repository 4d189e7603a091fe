from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptive.inference.calibration.reliability import Reliability, reliability
from tests.inference.answers import calibrated_logits


def test_ece_of_calibrated_and_overconfident_answers() -> None:
    logits, labels = calibrated_logits(20_000)

    def measured(values: torch.Tensor) -> Reliability:
        confidence, answer = values.softmax(-1).max(-1)
        return reliability(confidence.numpy(), (answer == labels).numpy())

    assert measured(logits).ece < 1.5
    assert measured(4 * logits).ece > 10


def test_ece_by_hand() -> None:
    confidences = np.array([0.0, 0.2, 0.5, 0.6, 0.9, 1.0])
    found = reliability(confidences, np.array([False, True, True, False, True, True]), bins=2)
    assert found.share == [0.5, 0.5]  # 0.5 closes the lower bin
    assert found.confidence == pytest.approx([0.7 / 3, 2.5 / 3])
    assert found.accuracy == pytest.approx([2 / 3, 2 / 3])
    assert found.ece == pytest.approx(100 * (abs(2 - 0.7) + abs(2 - 2.5)) / 6)


def test_empty_bins_count_nothing() -> None:
    found = reliability(np.array([0.95, 0.97]), np.array([True, True]), bins=10)
    assert found.share == [1.0]
    assert found.confidence == pytest.approx([0.96])
    assert found.ece == pytest.approx(4)


def test_points_leave_out_bins_with_few_images() -> None:
    found = reliability(np.array([0.1, 0.9, 0.9, 0.9]), np.array([True, True, True, False]), bins=2)
    assert found.points(0.5) == (pytest.approx([0.9]), pytest.approx([2 / 3]))
