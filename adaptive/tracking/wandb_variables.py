"""W&B's environment variables beside the tracking section: what the environment switches off stays off."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from adaptive.config.sections import TrackingConfig

LOGGER = logging.getLogger(__name__)
Mode = Literal["disabled", "offline", "online"]
MODES: dict[str, Mode] = {
    "disabled": "disabled", "offline": "offline", "dryrun": "offline",
    "online": "online", "run": "online", "shared": "online",
}  # fmt: skip
RESERVE: list[Mode] = ["disabled", "offline", "online"]  # the most reserved first
# Variables that the client would read, and what it is given instead.
REPLACED = {
    "WANDB_PROJECT": "project",
    "WANDB_ENTITY": "entity",
    "WANDB_NAME": "name",
    "WANDB_RUN_GROUP": "group",
    "WANDB_JOB_TYPE": "job_type",
    "WANDB_TAGS": "tags",
}


def mode_in_effect(tracking: TrackingConfig, environment: Mapping[str, str]) -> Mode:
    """Return the more reserved of ``tracking.wandb`` and the environment's WANDB_MODE, and log where they differ.

    WANDB_DISABLED counts as WANDB_MODE=disabled. A word that W&B does not know is logged, and left aside.
    """
    name, word = "WANDB_MODE", environment.get("WANDB_MODE", "").strip().lower()
    if environment.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes", "on"):
        name, word = "WANDB_DISABLED", "disabled"
    asked = tracking.wandb
    if not word:
        return asked
    if word not in MODES:
        LOGGER.warning("WANDB_MODE = %r is no mode of W&B and is left aside; use online, offline or disabled", word)
        return asked
    mode = min(asked, MODES[word], key=RESERVE.index)
    if MODES[word] != asked:
        LOGGER.warning(
            "%s in the environment says %s, tracking.wandb = %r: W&B is %s; unset the one, or change the other",
            name, word, asked, mode,
        )  # fmt: skip
    return mode


def unused_variables(tracking: TrackingConfig, name: str, environment: Mapping[str, str]) -> list[str]:
    """Return a line for every variable of W&B's whose value gives way to the configuration's.

    ``name`` is the run's where ``tracking.name`` leaves it open.
    """
    notes = []
    for variable, key in REPLACED.items():
        value = environment.get(variable)
        ours = getattr(tracking, key) if key != "name" else tracking.name or name
        shown = ",".join(ours) if isinstance(ours, list) else ours
        if value and ours is not None and value != shown:
            notes.append(f"{variable} = {value!r} is not used: tracking.{key} = {ours!r} counts; change that instead")
    own_id = environment.get("WANDB_RUN_ID") and not environment.get("WANDB_SWEEP_ID")
    for variable, instead in (("WANDB_RUN_ID", "wandb/run_id in the run folder"), ("WANDB_DIR", "the run folder")):
        if environment.get(variable) and (own_id or variable != "WANDB_RUN_ID"):
            notes.append(f"{variable} = {environment[variable]!r} is not used: {instead} counts")
    return notes
