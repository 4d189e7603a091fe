"""What W&B's own environment variables say beside the tracking section: the more reserved mode counts."""

import logging
from pathlib import Path

import pytest

from adaptive.config.sections import TrackingConfig
from adaptive.tracking.dashboard import Dashboard, open_dashboard

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.mark.parametrize(
    ("asked", "variables", "in_effect", "parts"),
    [
        ("online", {"WANDB_MODE": "disabled"}, "disabled", ["WANDB_MODE", "'online'", "W&B is disabled"]),
        ("online", {"WANDB_MODE": "offline"}, "offline", ["WANDB_MODE", "W&B is offline"]),
        ("online", {"WANDB_MODE": "dryrun"}, "offline", ["dryrun", "W&B is offline"]),
        ("offline", {"WANDB_MODE": "Disabled"}, "disabled", ["W&B is disabled"]),
        ("offline", {"WANDB_MODE": "online"}, "offline", ["W&B is offline"]),
        ("disabled", {"WANDB_MODE": "online"}, "disabled", ["W&B is disabled"]),
        ("online", {"WANDB_DISABLED": "true"}, "disabled", ["WANDB_DISABLED", "W&B is disabled"]),
        ("online", {"WANDB_MODE": "onlien"}, "online", ["WANDB_MODE = 'onlien'", "use online, offline or disabled"]),
        ("online", {"WANDB_MODE": "online"}, "online", []),
        ("offline", {"WANDB_DISABLED": "false"}, "offline", []),
    ],
)
def test_the_more_reserved_mode_counts(
    asked: str, variables: dict[str, str], in_effect: str, parts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    from adaptive.tracking.wandb_variables import mode_in_effect

    tracking = TrackingConfig.model_validate({"wandb": asked})
    assert mode_in_effect(tracking, variables) == in_effect
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(parts)
    for part in parts:
        assert part in lines[0]


def test_what_the_environment_disables_starts_no_client(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    dashboard = open_dashboard(TrackingConfig(wandb="online", init_timeout=2.0), run_folder, {}, {})
    assert type(dashboard) is Dashboard
    assert list(run_folder.iterdir()) == []
    assert ["WANDB_MODE" in r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [True]


def test_names_that_give_way_are_told() -> None:
    from adaptive.tracking.wandb_variables import unused_variables

    variables = {
        "WANDB_PROJECT": "mine", "WANDB_NAME": "first", "WANDB_TAGS": "a,b", "WANDB_ENTITY": "team",
        "WANDB_RUN_ID": "x1", "WANDB_DIR": "/tmp/elsewhere",
    }  # fmt: skip
    lines = unused_variables(TrackingConfig(tags=["b"], group="study"), "digits", variables)
    found = {line.split(" ")[0]: line for line in lines}
    assert set(found) == set(variables) - {"WANDB_ENTITY"}  # which nothing replaces
    assert found["WANDB_PROJECT"] == (
        "WANDB_PROJECT = 'mine' is not used: tracking.project = 'adaptive' counts; change that instead"
    )
    assert "tracking.name = 'digits'" in found["WANDB_NAME"]
    assert unused_variables(TrackingConfig(), "digits", {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r"}) == []
