from __future__ import annotations

import pytest

from adaptive.config.sections import PhaseConfig
from adaptive.training.phases import plan_phase
from tests.training.setups import config


@pytest.mark.parametrize(
    ("model", "learn", "phase", "expected"),
    [
        (True, "all", None, "crossing"),
        ("tap", "all", None, "tap"),
        (False, "all", None, False),
        ("tap", "backbone", None, False),
        ("tap", "all", False, False),
        ("tap", "backbone", True, "tap"),
        (False, "all", True, "crossing"),
    ],
)
def test_equilibrium_of_a_phase(model: bool | str, learn: str, phase: bool | None, expected: str | bool) -> None:
    settings = config("unused", model={"equilibrium": model})
    found = plan_phase(settings, PhaseConfig.model_validate({"name": "x", "learn": learn, "equilibrium": phase}), 3)
    assert found.equilibrium == expected
