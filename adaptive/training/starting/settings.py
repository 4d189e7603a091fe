"""Fills in what a configuration leaves open and the weights that it begins with decide."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from adaptive.config.saved import read_saved
from adaptive.config.sections import Config, DataConfig
from adaptive.errors import ConfigError, ModelError
from adaptive.networks.weights.trained_with import of_model
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.starting.from_run import open_run, take_architecture

IMAGES = ("mean", "std", "interpolation", "eval_crop")  # keys of the data section that weights decide
ARCHITECTURE = ("exits", "head_width", "collaboration", "options")  # of the model section, with model.from_run
LOGGER = logging.getLogger(__name__)


def complete(config: Config) -> Config:
    """Return a configuration whose open keys are those of the weights that it begins with.

    Mean, std, interpolation and eval_crop are taken as the weights were trained with: timm's notes of pretrained ones,
    an export's header, the run of model.from_run, which also gives the architecture. What contradicts them is logged.
    A run that goes on takes what it began with from its own folder. Without weights nothing changes.

    Raises:
        ConfigError: the run of model.from_run is none, or of another architecture; a header of weights says nonsense.
    """
    model = config.model
    if not (model.pretrained or model.weights or model.from_run):
        return config
    folder = Path(str(config.train.run_folder))
    if CheckpointStore(folder / "checkpoints").all() and (folder / "config.yaml").is_file():
        return _as_begun(config, read_saved(folder / "config.yaml"))
    if model.from_run:
        source = open_run(Path(model.from_run))
        trained = {key: getattr(source.config.data, key) for key in IMAGES}
        config = config.model_copy(update={"model": take_architecture(model, source)})
        return _with_images(config, trained, model.from_run)
    try:
        noted = of_model(model)
    except ModelError as error:
        raise ConfigError(f"model.{error}") from error
    return config if noted is None else _with_images(config, noted.settings(), noted.source)


def _as_begun(config: Config, saved: Config) -> Config:
    """Fill in from the configuration that the run was begun with; what differs is for `find_resume_point` to refuse."""
    data = {key: getattr(saved.data, key) for key in IMAGES if key not in config.data.model_fields_set}
    model: dict[str, Any] = {}
    if config.model.from_run:
        given = {key for key in config.model.model_fields_set if getattr(config.model, key) is not None}
        model = {key: getattr(saved.model, key) for key in ARCHITECTURE if key not in given}
        if config.model.exits == len(saved.model.exits if isinstance(saved.model.exits, list) else []) + 1:
            model["exits"] = saved.model.exits  # the same, by number
        if "options" in given:
            model["options"] = {**saved.model.options, **config.model.options}
    return config.model_copy(
        update={"data": config.data.model_copy(update=data), "model": config.model.model_copy(update=model)}
    )


def _with_images(config: Config, trained: dict[str, Any], source: str) -> Config:
    data = config.data
    if contrary := [key for key in trained if key in data.model_fields_set and _contradicts(data, key, trained[key])]:
        here = ", ".join(f"data.{key} = {getattr(data, key)}" for key in contrary)
        there = ", ".join(str(trained[key]) for key in contrary)
        LOGGER.warning(
            "note: %s, but the weights of %s were trained with %s; leave %s out to take that",
            here, source, there, "them" if len(contrary) > 1 else f"data.{contrary[0]}",
        )  # fmt: skip
    update = {key: value for key, value in trained.items() if key not in data.model_fields_set}
    return config.model_copy(update={"data": data.model_copy(update=update)})


def _contradicts(data: DataConfig, key: str, value: Any) -> bool:
    mine = getattr(data, key)
    if key == "eval_crop":
        return data.crop == "resize" and not math.isclose(mine, value, abs_tol=5e-3)
    if key == "interpolation":
        return "random" not in (mine, value) and mine != value
    return any(not math.isclose(a, b, abs_tol=5e-3) for a, b in zip(mine, value, strict=True))
