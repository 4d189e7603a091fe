from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from adaptive.inference.calibration.temperature import HIGHEST, LOWEST, expected_calibration_error, fit_temperatures


def _logits(images: int = 3000, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of which the softmax is exactly the probability of the label that is drawn from it."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def test_temperatures_undo_a_scale() -> None:
    logits, labels = _logits(20_000)
    found = fit_temperatures(torch.stack([logits, 3 * logits, logits / 2]), labels)
    assert found[0] == pytest.approx(1, abs=0.05)
    assert found[1] == pytest.approx(3 * found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0] / 2, rel=1e-4)


def test_temperature_is_the_minimum() -> None:
    logits, labels = _logits(500)
    logits = 2.5 * logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    other = minimize_scalar(
        lambda t: F.cross_entropy(logits.double() / t, labels).item(), bounds=(0.05, 20), options={"xatol": 1e-9}
    )
    assert fit_temperatures(logits.unsqueeze(0), labels)[0] == pytest.approx(other.x, rel=1e-4)


def test_separable_and_hopeless_images_end_at_the_bounds() -> None:
    labels = torch.arange(40) % 4
    sure = F.one_hot(labels, 4).float()
    found = fit_temperatures(torch.stack([sure, -sure, 1e30 * sure]), labels)
    assert found[0] == pytest.approx(LOWEST, rel=1e-4)
    assert found[1] == pytest.approx(HIGHEST, rel=1e-4)
    assert LOWEST <= found[2] <= HIGHEST


def test_ece_of_calibrated_and_overconfident_answers() -> None:
    logits, labels = _logits(20_000)
    confidence, answer = logits.softmax(-1).max(-1)
    assert expected_calibration_error(confidence, answer == labels).ece < 0.015
    over, answer = (4 * logits).softmax(-1).max(-1)
    assert expected_calibration_error(over, answer == labels).ece > 0.1


def test_ece_by_hand() -> None:
    confidences = torch.tensor([0.0, 0.2, 0.5, 0.6, 0.9, 1.0])
    correct = torch.tensor([False, True, True, False, True, True])
    found = expected_calibration_error(confidences, correct, bins=2)
    assert found.edges == [0, 0.5, 1]
    assert found.counts == [3, 3]  # 0.5 closes the lower bin
    assert found.confidence == pytest.approx([0.7 / 3, 2.5 / 3])
    assert found.accuracy == pytest.approx([2 / 3, 2 / 3])
    assert found.ece == pytest.approx((abs(2 - 0.7) + abs(2 - 2.5)) / 6)


def test_empty_bins_count_nothing() -> None:
    found = expected_calibration_error(torch.tensor([0.95, 0.97]), torch.tensor([True, True]), bins=10)
    assert found.counts == [0] * 9 + [2]
    assert found.ece == pytest.approx(0.04)
