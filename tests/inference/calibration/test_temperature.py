from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from adaptive.inference.calibration.temperature import HIGHEST, LOWEST, fit_temperatures
from tests.inference.answers import calibrated_logits


def test_temperatures_undo_a_scale() -> None:
    logits, labels = calibrated_logits(20_000)
    found = fit_temperatures(torch.stack([logits, 3 * logits, logits / 2]), labels)
    assert found[0] == pytest.approx(1, abs=0.05)
    assert found[1] == pytest.approx(3 * found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0] / 2, rel=1e-4)


def test_temperature_is_the_minimum() -> None:
    logits, labels = calibrated_logits(500)
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
