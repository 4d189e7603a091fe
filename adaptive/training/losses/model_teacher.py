"""Another timm model as teacher: built and loaded, and fed the student's images as it was trained to see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.config.sections import DataConfig, DistillationConfig
from adaptive.errors import ConfigError, ModelError, reason_of
from adaptive.networks.backbone import Backbone, build_backbone
from adaptive.networks.weights.initial_weights import left_fresh, load_file
from adaptive.networks.weights.trained_with import TrainedWith, of_backbone, of_file
from adaptive.training.losses.distillation import NetworkTeacher


class Feed(nn.Module):
    """Turns images as the student gets them into what a teacher was trained with, where that differs.

    Args:
        data: how the student's images were prepared.
        trained: how the teacher's were; None where it is not known, and they stay as they are.
        size: side of the teacher's images in pixels.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, data: DataConfig, trained: TrainedWith | None, size: int) -> None:
        super().__init__()
        self.size = size
        self.mode = "bilinear" if trained is not None and trained.interpolation == "bilinear" else "bicubic"
        mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (data.mean, data.std))
        own = (data.mean, data.std) if trained is None else (trained.mean, trained.std)
        teacher_mean, teacher_std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in own)
        self.register_buffer("scale", (std / teacher_std).float(), persistent=False)
        self.register_buffer("shift", ((mean - teacher_mean) / teacher_std).float(), persistent=False)
        self.same = list(data.mean) == list(own[0]) and list(data.std) == list(own[1])

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W), normalised for the student -> (N, 3, size, size), normalised for the teacher."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode=self.mode, antialias=True)
        return images if self.same else images * self.scale + self.shift


class ModelTeacher(NetworkTeacher):
    """Another network that teaches with its logits on images that are prepared as for its own training."""

    def __init__(self, network: nn.Module, autocast: torch.autocast, feed: Feed) -> None:
        super().__init__(network, autocast)
        self.feed = feed

    @torch.no_grad()
    def __call__(self, images: Tensor, logits: Sequence[Tensor]) -> Tensor:
        """Return the teacher's logits (N, C) for the student's images (N, 3, H, W)."""
        return super().__call__(self.feed(images), logits)


def model_teacher(
    config: DistillationConfig, data: DataConfig, num_classes: int, device: torch.device, autocast: torch.autocast
) -> ModelTeacher:
    """Build the timm model that ``distillation.teacher_model`` names, and try it on one image.

    Raises:
        ConfigError: it cannot be built or loaded, is of other classes, or does not run on images of that size.
    """
    plain, feed = _built(config, data, num_classes, pretrained=config.teacher_weights is None)
    try:
        weights = config.teacher_weights
        fresh = left_fresh(plain) if weights is None else load_file(plain, Path(weights))
    except ModelError as error:
        raise ConfigError(f"distillation.teacher_{error}") from error
    if fresh:
        raise ConfigError(_other_classes(config, num_classes))
    try:
        with torch.no_grad():
            plain.model.eval()(feed(torch.zeros(1, 3, data.image_size, data.image_size)))
    except Exception as error:
        raise ConfigError(_cannot_teach(config, data, num_classes, error)) from error
    return ModelTeacher(plain.model.to(device), autocast, feed.to(device))


def unloaded_teacher(
    config: DistillationConfig, data: DataConfig, num_classes: int, autocast: torch.autocast
) -> ModelTeacher:
    """Build the same teacher with random weights, to see what it takes (raises ConfigError)."""
    plain, feed = _built(config, data, num_classes, pretrained=False)
    return ModelTeacher(plain.model, autocast, feed)


def check_teacher_classes(config: DistillationConfig, num_classes: int) -> None:
    """Refuse pretrained weights of other classes, without fetching them (raises ConfigError)."""
    if config.teacher_weights is None:
        noted = of_backbone(str(config.teacher_model), config.teacher_options)
        if noted is not None and noted.num_classes != num_classes:
            raise ConfigError(_other_classes(config, num_classes, noted.num_classes))


def _built(config: DistillationConfig, data: DataConfig, num_classes: int, pretrained: bool) -> tuple[Backbone, Feed]:
    """Build the model for its own image size where that is known: an option's, its weights', or else the student's."""
    name, options, weights = str(config.teacher_model), config.teacher_options, config.teacher_weights
    try:
        trained = of_backbone(name, options) if weights is None else of_file(Path(weights), name, options)
        size = options.get("img_size") or (trained.image_size if trained else None) or data.image_size
        side = size[-1] if isinstance(size, list | tuple) else size
        with torch.random.fork_rng(devices=[]):
            plain = build_backbone(name, side, num_classes=num_classes, pretrained=pretrained, **options)
        return plain, Feed(data, trained, side)
    except (ModelError, TypeError) as error:
        raise ConfigError(_cannot_teach(config, data, num_classes, error)) from error


def _cannot_teach(config: DistillationConfig, data: DataConfig, num_classes: int, error: Exception) -> str:
    name, size = config.teacher_model, data.image_size
    return (
        f"distillation.teacher_model = {name!r} cannot teach {num_classes} classes at {size} pixels: {reason_of(error)}"
    )


def _other_classes(config: DistillationConfig, num_classes: int, theirs: int | None = None) -> str:
    key = "teacher_model" if config.teacher_weights is None else "teacher_weights"
    of = f"is of {theirs} classes" if theirs else "has a classifier of other classes, or none"
    return (
        f"distillation.{key} = {getattr(config, key)!r} {of}, and this dataset has {num_classes} classes: its "
        "classifier would be random; give distillation.teacher_weights, a file of this model trained on these classes"
    )
