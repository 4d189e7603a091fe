"""Configurations in run folders: written without secrets, and read as data, which grants nothing by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptive.config.loading import dump_config, load_tree, overridden, parse_config, private_file
from adaptive.config.sections import Config, DataConfig, TrackingConfig
from adaptive.errors import ConfigError
from adaptive.files import write_atomically
from adaptive.foreign_text import without_secrets

# Of a finished run only these may be given anew. What permits something or names a place to write to or to send to
# counts from here alone, and not from the run's own configuration.
GIVEN_ANEW = (
    "data.path", "data.pipe", "data.cache", "data.cache_gib", "data.cache_ahead", "data.attempts", "data.timeout",
    "data.max_bad", "tracking.wandb", "tracking.entity", "tracking.project",
)  # fmt: skip
READERS = ("pipe", "cache", "cache_gib", "cache_ahead")  # of section data: permissions and places of who reads
# Arguments of timm.create_model that load or download something; a finished run has its weights.
FETCHING = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
)
_KEY = re.compile(r"(?:[a-z_]+\.)+[a-z_]+=.*", re.DOTALL)


def write_config(config: Config, path: Path) -> None:
    """Write a complete configuration for everybody, and its secrets into a file beside it that its owner alone reads.

    ``config.yaml`` holds ``***`` in place of passwords, signatures and commands; ``config.private.yaml`` (mode 0600)
    holds the values, and is there only where there are some. `adaptive.config.loading.load_config` joins them.
    """
    tree = config.model_dump()
    private, secrets = private_file(path), _secret_values(tree)
    if secrets:
        write_atomically(private, dump_config(secrets), private=True)
    else:
        private.unlink(missing_ok=True)
    write_atomically(path, dump_config(without_secrets(tree)))


def read_saved(path: Path) -> Config:
    """Read a run's configuration as it was written (raises ConfigError); unlike a user's own it extends no file."""
    tree = load_tree(path, may_extend=False)
    return parse_config(tree, source=str(path))


def for_inference(config: Config, folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return a finished run's configuration without what a run may not decide, changed by the user's ``overrides``.

    Commands in data.path are not allowed, shards are cached where the user's are, no weights are loaded from where the
    run's came from, and W&B's entity and project are the user's own.

    Raises:
        ConfigError: an override is wrong, or says nothing about a finished run.
    """
    for override in overrides:
        if (key := override.partition("=")[0]) not in GIVEN_ANEW:
            raise ConfigError(f"{key} cannot be given for a finished run; known here: {', '.join(GIVEN_ANEW)}")
    data = {key: DataConfig.model_fields[key].default for key in READERS}
    options = {key: value for key, value in config.model.options.items() if key not in FETCHING}
    teacher: dict[str, Any] = {"teacher_weights": None, "teacher_options": {}}
    usual = TrackingConfig()
    mine = config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "model": config.model.model_copy(
                update={"pretrained": False, "weights": None, "from_run": None, "options": options}
            ),
            "distillation": config.distillation.model_copy(update=teacher),
            "train": config.train.model_copy(update={"run_folder": str(folder)}),
            "tracking": config.tracking.model_copy(update={"entity": usual.entity, "project": usual.project}),
            "deepspeed": {},
        }
    )
    return overridden(mine, overrides) if overrides else mine


def granted(config: Config) -> list[str]:
    """Return a user's own configuration of reading data as the overrides that `for_inference` takes."""
    usual = {key: DataConfig.model_fields[key].default for key in READERS}
    own = {key: value for key in READERS if (value := getattr(config.data, key)) != usual[key]}
    return [f"data.{key}={json.dumps(value)}" for key, value in own.items()]


def check_receiver(said: Config, config: Config, overrides: Sequence[str]) -> None:
    """Refuse to send a run's results where only the run says that they go (raises ConfigError).

    ``said`` is the run's own configuration, ``config`` the one that `for_inference` made of it.
    """
    given = {override.partition("=")[0] for override in overrides}
    unconfirmed = [
        f"tracking.{key}={there}"
        for key in ("entity", "project")
        if (there := getattr(said.tracking, key)) != getattr(config.tracking, key) and f"tracking.{key}" not in given
    ]
    if unconfirmed:
        raise ConfigError(
            f"this run's config.yaml names a place in W&B of its own; to send results there say so: "
            f"{' '.join(unconfirmed)}, or give another by these keys"
        )


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split words of a command line into those that name something, and overrides such as ``data.pipe=true``."""
    found = [word for word in words if _KEY.fullmatch(word) and not Path(word).exists()]
    return [word for word in words if word not in found], found


def _secret_values(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a tree whose values hold secrets."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            if inner := _secret_values(value):
                found[key] = inner
        elif without_secrets(value) != value:
            found[key] = value
    return found
