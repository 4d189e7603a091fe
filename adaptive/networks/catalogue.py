"""The backbones that can be trained, as ``adaptive models`` lists them: timm's by name and family, and our own."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any

import timm
import torch

from adaptive.errors import ModelError, nearest
from adaptive.networks.backbone import build_backbone, configuration, other_model
from adaptive.networks.cutting.cut import survey_by_name
from adaptive.networks.multiscale.assemble import is_multi_exit
from adaptive.networks.multiscale.presets import MSDNETS, RANETS
from adaptive.networks.multiscale.registration import NETWORKS
from adaptive.networks.weights.trained_with import of_backbone

OWN_FAMILY = NETWORKS.rpartition(".")[2]  # timm names families by modules
WILDCARDS = "*?["


@dataclass(frozen=True)
class ModelEntry:
    """One model of a list, as ``adaptive models`` shows it.

    Attributes:
        name: for ``model.backbone``.
        parameters: with timm's own number of classes; None if it was not counted.
        input_size: side in pixels of the images it was made for; None if timm does not say.
        pretrained: whether timm has weights of it.
        note: why it cannot be trained here, else empty.
    """

    name: str
    parameters: int | None
    input_size: int | None
    pretrained: bool
    note: str = ""


@dataclass(frozen=True)
class BranchPointEntry:
    """A branch point of a list: a module after which an early exit can branch off, and what it costs to get there.

    Attributes:
        name: for ``model.exits``.
        macs: multiply-adds of the backbone up to its end, for one image.
        share: of the backbone's multiply-adds, 0 to 1.
        shape: of the feature there, without the batch.
        tensors: that cross the branch point.
    """

    name: str
    macs: int
    share: float
    shape: tuple[int, ...]
    tensors: int


def families() -> dict[str, int]:
    """Return timm's families (a file of architectures each) with their numbers of models."""
    return {name: len(timm.list_models(module=name)) for name in timm.list_modules() if name != OWN_FAMILY}


def presets() -> list[str]:
    """Return the names of the networks that bring exits of their own."""
    return [*MSDNETS, *RANETS]


def is_one_model(word: str) -> bool:
    """Whether a word is the name of one model (with or without a tag of pretrained weights)."""
    return not set(WILDCARDS) & set(word) and timm.is_model(word.partition(".")[0])


def matching(pattern: str) -> list[str]:
    """Return the names that a pattern with timm's wildcards, or the name of a family, stands for.

    A pattern with a dot asks for names with the tag of their pretrained weights (``resnet50.*``).

    Raises:
        ModelError: there are none; names the nearest ones.
    """
    tagged = "." in pattern
    if not set(WILDCARDS) & set(pattern) and pattern in timm.list_modules():
        found = timm.list_models(module=pattern)
    else:
        found = fnmatch.filter(timm.list_models(pretrained=tagged), pattern)
    if not found:
        if "/" in pattern:
            raise ModelError(f"{pattern!r} is no model of timm; {other_model(pattern)}")
        known = [*timm.list_models(), *families()]
        name = pattern.strip(WILDCARDS + "]")
        remedy = nearest(name, known, "adaptive models lists the families", cutoff=0.5)
        raise ModelError(f"{pattern!r} is no model, no family, and matches none; {remedy}")
    return list(found)


def model_entry(name: str, count: bool = True) -> ModelEntry:
    """Describe a model in one line; with ``count`` it is built without memory for its weights, to count them."""
    noted = timm.get_pretrained_cfg(name)
    size = noted.input_size[-1] if noted is not None else None
    pretrained = timm.is_model_pretrained(name)
    if not count:
        return ModelEntry(name, None, size, pretrained)
    try:
        with torch.device("meta"):
            model = build_backbone(name, num_classes=1000).model
    except ModelError as error:
        note = str(error).partition(": ")[2]
        # Some need real numbers while they are built; that says nothing about training them.
        return ModelEntry(name, None, size, pretrained, note if "no logits" in note else "")
    size = size or configuration(model).get("input_size", (3, None, None))[-1]
    return ModelEntry(name, sum(p.numel() for p in model.parameters()), size, pretrained)


def pretrained_entry(name: str) -> dict[str, Any] | None:
    """Return what timm notes of a model's pretrained weights; None without any.

    That is the tag (the first, where the name has none), all tags, number of classes, image size, and how images are
    prepared, by key of the data section.
    """
    trained = of_backbone(name, {})
    if trained is None:
        return None
    plain, _, tag = name.partition(".")
    tags = [found.partition(".")[2] for found in timm.list_models(f"{plain}.*", pretrained=True)]
    noted = timm.get_pretrained_cfg(name)
    own = tag or (noted.tag if noted is not None else "") or ""
    about = {"tag": own, "tags": tags, "num_classes": trained.num_classes, "image_size": trained.image_size}
    return about | trained.settings()


def branch_point_entries(name: str, input_size: int | None = None) -> tuple[int, list[BranchPointEntry]]:
    """Build a timm model and list where early exits can branch off.

    Args:
        name: of a timm model that brings no exits of its own.
        input_size: side of the square image in pixels; by default the model's own.

    Returns:
        The side that was used, and the branch points from input to output.

    Raises:
        ModelError: no such model, or it does not run on such images.
    """
    assert not is_multi_exit(name)
    plain, surveyed = survey_by_name(name, input_size)
    total = surveyed.recording.macs // 2  # of a recording with two images
    points = [
        BranchPointEntry(point.name, round(point.share * total), point.share, point.shape, point.crossing)
        for point in surveyed.branch_points()
    ]
    return plain.size, points
