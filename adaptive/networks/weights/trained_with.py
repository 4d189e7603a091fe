"""How images were prepared for weights: what timm notes of its pretrained ones, and what an export's header says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
from pydantic import ValidationError
from timm.models import PretrainedCfg, resolve_pretrained_cfg

from adaptive.config.sections import DataConfig, ModelConfig
from adaptive.errors import ModelError
from adaptive.networks.weights.weights_file import read_header

HEADER = "data"  # entry of an export's header
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class TrainedWith:
    """The preparation of images that weights were trained with; keys of the data section where they bear their names.

    Attributes:
        source: whose weights they are.
        image_size: side in pixels; None if it is not known.
        num_classes: of the weights' classifier; None if it is not known.
    """

    source: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    eval_crop: float
    image_size: int | None = None
    num_classes: int | None = None

    def settings(self) -> dict[str, Any]:
        """Return the values by key of the data section; an interpolation that it lacks is left out."""
        values = {"mean": list(self.mean), "std": list(self.std), "eval_crop": self.eval_crop}
        return values | ({"interpolation": self.interpolation} if self.interpolation in INTERPOLATIONS else {})


def of_model(model: ModelConfig) -> TrainedWith | None:
    """Return how images were prepared for the weights that a network begins with; None for none, or unknown ones."""
    if model.pretrained:
        return of_backbone(model.backbone, model.options)
    return None if model.weights is None else of_file(Path(model.weights), model.backbone, model.options)


def of_backbone(name: str, options: dict[str, Any]) -> TrainedWith | None:
    """Return what timm notes of a backbone's pretrained weights; None where it has none.

    Args:
        name: of the timm model, with the tag of its weights or without.
        options: further arguments of timm.create_model, which may choose others or change what is noted.
    """
    if not timm.is_model(name.partition(".")[0]):
        return None
    variant, _, tag = name.partition(".")
    given = options.get("pretrained_cfg") or tag or None
    if not given and timm.get_pretrained_cfg(name, allow_unregistered=True) is None:
        return None
    try:
        noted = resolve_pretrained_cfg(variant, given, options.get("pretrained_cfg_overlay"))
    except (RuntimeError, TypeError, AttributeError):
        return None  # building the model will say what is wrong
    return _of(noted, f"timm's {name}") if noted.has_weights else None


def of_file(path: Path, name: str, options: dict[str, Any]) -> TrainedWith | None:
    """Return what an export's header says, for other files what timm notes of the backbone's pretrained weights.

    Of those neither image size nor number of classes is known.

    Raises:
        ModelError: the header holds something else.
    """
    header = read_header(path)
    noted = header.get(HEADER)
    if isinstance(noted, dict):
        return _of_header(path, noted)
    # An export of an earlier version does not say, and was trained with what its configuration said.
    if {"backbone", "step"} <= header.keys():
        return None
    found = of_backbone(name, options)
    return None if found is None else replace(found, image_size=None, num_classes=None)


def as_header(data: DataConfig, num_classes: int) -> dict[str, Any]:
    """Return the header's entry for weights that were trained with these settings."""
    used = TrainedWith(
        "", tuple(data.mean), tuple(data.std), "bicubic" if data.interpolation == "random" else data.interpolation,
        data.eval_crop, data.image_size, num_classes,
    )  # fmt: skip
    return {HEADER: {key: value for key, value in asdict(used).items() if key != "source"}}


def _of_header(path: Path, noted: dict[str, Any]) -> TrainedWith:
    """Read an export's entry, which anybody may have written (raises ModelError)."""
    keys = ("mean", "std", "interpolation", "eval_crop", "image_size")
    try:
        data = DataConfig.model_validate({"path": ".", **{key: noted[key] for key in keys}})
        return TrainedWith(
            str(path), tuple(data.mean), tuple(data.std), data.interpolation, data.eval_crop, data.image_size
        )
    except (KeyError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{error} is missing"
        raise ModelError(
            f"weights = {str(path)!r}: its header does not say how images are prepared ({HEADER}: {reason}); export it "
            "again: adaptive checkpoint RUN --export FILE"
        ) from None


def _of(noted: PretrainedCfg, source: str) -> TrainedWith:
    return TrainedWith(
        source=source,
        mean=tuple(noted.mean),
        std=tuple(noted.std),
        interpolation=noted.interpolation,
        eval_crop=noted.crop_pct,
        image_size=noted.input_size[-1],
        num_classes=noted.num_classes,
    )
