"""Plain timm models: building one, and what timm knows about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models import group_parameters
from timm.optim import auto_group_layers, param_groups_weight_decay
from torch import nn

from adaptive.errors import ModelError, nearest, reason_of


@dataclass(frozen=True)
class Backbone:
    """A plain timm model, the images it takes (channels, size, size in pixels), and the arguments it was built with."""

    name: str
    model: nn.Module
    size: int
    channels: int
    arguments: dict[str, Any] = field(default_factory=dict)


def build_backbone(name: str, input_size: int | None = None, **arguments: Any) -> Backbone:
    """Build a plain timm model.

    Args:
        name: of any timm model.
        input_size: side of the square images in pixels; by default the model's own.
        arguments: of timm.create_model.

    Raises:
        ModelError: timm has no such model, or cannot build it so.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise ModelError(f"backbone = {name!r}: timm has no such model; {other_model(name)}")
    try:
        if input_size is None or "img_size" in arguments:
            model = timm.create_model(name, **arguments)
        else:
            model, arguments = _build_for_size(name, input_size, arguments)
    except ModelError as error:
        raise ModelError(f"backbone = {name!r}: {error}") from error
    except Exception as error:  # timm and the hub raise whatever they like
        reason = reason_of(error)
        if arguments.get("pretrained") and isinstance(error, OSError):
            reason += "; pretrained weights need network access or a filled cache, or give a file with weights="
        raise ModelError(f"backbone = {name!r}: timm cannot build it with {arguments}: {reason}") from error
    _check_classifier(name, model, arguments)
    default = configuration(model).get("input_size", (3, 224, 224))
    size = input_size or arguments.get("img_size") or default
    side = size[-1] if isinstance(size, tuple | list) else size
    return Backbone(name, model, int(side), int(arguments.get("in_chans", default[0])), arguments)


def other_model(name: str) -> str:
    """Return the remedy for a name that timm does not know: a hub's prefix to be left out, or the nearest names."""
    plain = name.rpartition("/")[2]
    if plain != name and timm.is_model(plain.partition(".")[0]):
        return f"timm's own name of it has no prefix: {plain}"
    return nearest(plain, timm.list_models(), "timm.list_models() names them all", cutoff=0.5)


def _check_classifier(name: str, model: nn.Module, arguments: dict[str, Any]) -> None:
    """Refuse what leaves num_classes aside and returns features only (raises ModelError)."""
    num_classes = arguments.get("num_classes")
    if not num_classes or getattr(model, "num_classes", num_classes) == num_classes:
        return
    plain = name.partition(".")[0]
    classifiers = [other for other in timm.list_models() if f"{other}_enc" == plain]
    remedy = f"take {classifiers[0]}, its classifier" if classifiers else "take a model with a classifier"
    if arguments.get("features_only"):
        remedy = "leave features_only out"
    raise ModelError(f"backbone = {name!r}: timm's {type(model).__name__} returns features and no logits; {remedy}")


def _build_for_size(name: str, size: int, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Models with position embeddings or windows must be told the image size; the others do not know the argument."""
    try:
        sized = {**arguments, "img_size": size}
        return timm.create_model(name, **sized), sized
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return timm.create_model(name, **arguments), arguments


def configuration(model: nn.Module) -> dict[str, Any]:
    """What timm noted about a model: input size, name of the classifier and more."""
    return dict(getattr(model, "pretrained_cfg", None) or {})


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters of a timm model's classifiers."""
    names = configuration(model).get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def classifier_width(model: Any) -> int:
    """Width of the pooled feature that a timm model's own classifier reads."""
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    for part in classifier if isinstance(classifier, tuple | list) else (classifier,):
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if isinstance(module, nn.Linear):
                return module.in_features
            if isinstance(module, nn.modules.conv._ConvNd):
                return module.in_channels
    return int(getattr(model, "head_hidden_size", None) or getattr(model, "num_features", 0) or 1)


def layer_groups(model: Any) -> dict[str, int]:
    """Layer of every parameter (0 at the input), as timm groups them for layer-wise rates.

    By the model's own matcher, or by timm's even groups of parameters where it has none.
    """
    if not hasattr(model, "group_matcher"):
        return dict(auto_group_layers(model))
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    return {name: int(layer) for name, layer in groups.items()}


def spared_from_decay(model: Any) -> set[str]:
    """Names of the parameters that timm says should not decay; its patterns are matched as timm matches them."""
    patterns = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups = param_groups_weight_decay(model, 1.0, weight_decay_exclude_1d=False, no_weight_decay_list=patterns)
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in spared}
