"""The learning rate of a whole run: what goes elsewhere than a schedule means is refused, keys without use are told."""

from pathlib import Path
from typing import Any

import pytest

from adaptive.errors import ConfigError
from tests.training.checks.door import checked

MULTISTEP = {"name": "multistep"}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unordered": ({**MULTISTEP, "milestones": [0.9, 0.1]}, ["milestones = [0.9, 0.1]", "rising"]),
    "twice": ({**MULTISTEP, "milestones": [0.5, 0.5]}, ["milestones = [0.5, 0.5]", "at 0.5"]),
    "at_the_same_step": ({**MULTISTEP, "milestones": [0.5, 0.5001]}, ["milestones", "a step apart"]),
    "at_the_start": ({**MULTISTEP, "milestones": [0.0, 0.5]}, ["milestones", "at 0 of phase 'train'"]),
    "at_the_end": ({**MULTISTEP, "milestones": [0.5, 1.0]}, ["milestones", "at 1 of phase 'train'"]),
    "in_the_warmup": ({**MULTISTEP, "warmup_epochs": 2, "milestones": [0.1, 0.8]}, ["at 0.1", "behind the warm-up"]),
    "rises_to_min_lr": ({"name": "cosine", "min_lr": 0.5}, ["schedule.min_lr = 0.5", "rise", "optimizer.lr = 0.05"]),
    "rises_to_min_lr_by_poly": ({"name": "poly", "min_lr": 0.5, "decay_rate": 2.0}, ["schedule.min_lr = 0.5", "rise"]),
    "rising_steps": ({"name": "step", "decay_epochs": 1, "decay_rate": 2.0}, ["decay_rate = 2", "rise", "at most 1"]),
    "rising_milestones": ({**MULTISTEP, "decay_rate": 1.5}, ["decay_rate = 1.5", "rise"]),
    "warmup_from_above": ({"warmup_epochs": 1, "warmup_lr": 0.2}, ["warmup_lr = 0.2", "optimizer.lr = 0.05"]),
    "warmup_as_long_as_the_run": ({"warmup_epochs": 4}, ["schedule.warmup_epochs = 4", "4 epochs"]),
}
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "milestones_of_cosine": ({"milestones": [0.3]}, "schedule.milestones = [0.3] does nothing"),
    "min_lr_of_steps": ({"name": "step", "decay_epochs": 1, "min_lr": 0.01}, "schedule.min_lr = 0.01 does nothing"),
    "decay_rate_of_cosine": ({"decay_rate": 0.5}, "schedule.decay_rate = 0.5 does nothing"),
    "decay_epochs_of_multistep": ({**MULTISTEP, "decay_epochs": 2}, "schedule.decay_epochs = 2.0 does nothing"),
    "warmup_lr_without_warmup": ({"warmup_lr": 0.01}, "schedule.warmup_lr = 0.01 does nothing"),
    "warmup_below_a_step": ({"warmup_epochs": 0.001}, "schedule.warmup_epochs = 0.001 does nothing"),
    "steps_that_never_come": ({"name": "step"}, "schedule.name = 'step' never decays"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_rate_that_goes_elsewhere_is_refused(case: str, digits: Path) -> None:
    schedule, parts = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        checked(digits, train={"epochs": 4}, schedule=schedule)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("case", TOLD)
def test_a_key_that_does_not_change_the_rate_is_told(case: str, digits: Path) -> None:
    schedule, part = TOLD[case]
    notes = checked(digits, train={"epochs": 4}, schedule=schedule)
    assert [note for note in notes if part in note], notes


def test_a_phases_own_rate_is_compared_and_named(digits: Path) -> None:
    phases = [{"name": "first", "epochs": 2}, {"name": "second", "epochs": 2, "lr": 0.001}]
    with pytest.raises(ConfigError, match=r"schedule\.min_lr = 0\.01 .* phases\.1\.lr = 0\.001 of phase 'second'"):
        checked(digits, phases=phases, schedule={"min_lr": 0.01})


def test_schedules_that_do_as_they_say_are_quiet(digits: Path) -> None:
    for schedule in (
        {"name": "cosine", "warmup_epochs": 1, "warmup_lr": 0.01, "min_lr": 0.001},
        {**MULTISTEP, "warmup_epochs": 0.5, "milestones": [0.25, 0.5, 0.75], "decay_rate": 0.5},
        {"name": "step", "decay_epochs": 1.5, "decay_rate": 0.9},
        {"name": "poly", "decay_rate": 2.0},
        {"name": "constant", "warmup_epochs": 1},
    ):
        assert checked(digits, train={"epochs": 4}, schedule=schedule) == [], schedule
