"""Builds the network that a configuration describes: to be trained, or to load a checkpoint's weights into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adaptive.config.sections import Config, ModelConfig
from adaptive.errors import ModelError
from adaptive.networks.create import create_model, outline_model
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.weights.trained_with import TrainedWith, of_model

RGB = 3  # channels of a decoded image
# Arguments of create_model and of timm's that other keys own: given twice, the two could disagree.
OWNED_OPTIONS = {
    "name": "model.backbone",
    "model_name": "model.backbone",
    "checkpoint_path": "model.weights",
    "input_size": "data.image_size",
    **{key: f"model.{key}" for key in ModelConfig.model_fields if key not in ("backbone", "options")},
}


def check_options(config: Config) -> None:
    """Refuse model.options that another key owns or contradicts, or that timm would leave aside (ModelError)."""
    for key, value in config.model.options.items():
        where = f"model.options.{key} = {value!r}"
        if key in OWNED_OPTIONS:
            raise ModelError(f"{where} is set by {OWNED_OPTIONS[key]}; remove it from model.options")
        if value is None:
            raise ModelError(f"{where} does nothing: timm leaves out arguments without a value; remove it")
        side = config.data.image_size
        if key == "img_size" and value not in (side, [side, side], (side, side)):
            raise ModelError(f"{where} is not data.image_size = {side}; remove it, the network is built for that size")
        if key == "in_chans" and value != RGB:
            raise ModelError(
                f"{where}: images are decoded as RGB, grey ones too, and the network takes their three channels; leave "
                "in_chans out (weights of other channels are adapted)"
            )


def build_network(
    config: Config, num_classes: int, load: bool = True, weights: Mapping[str, Tensor] | None = None
) -> AdaptiveNetwork:
    """Build the configured network with the seed's initial weights, or the pretrained ones, on the CPU.

    Without ``load`` no weights are fetched or read: those of a checkpoint will take their place. ``weights`` are a
    plain timm model's state_dict to begin with.

    Raises:
        ModelError: the backbone cannot be built or cut like that; the message names the key.
    """
    model = config.model
    check_options(config)
    if load and model.pretrained:
        _pretrained(model)
    torch.manual_seed(config.train.seed)
    start: dict[str, Any] = {"pretrained": model.pretrained, "weights": model.weights} if load else {}
    if weights is not None:
        start = {"weights": weights}
    return _checked(config, lambda: _create(create_model, config, num_classes, model.exits, **start))


def _checked(config: Config, build: Callable[[], AdaptiveNetwork]) -> AdaptiveNetwork:
    """Build a network for images as they are decoded (raises ModelError, with the key's name)."""
    model = config.model
    try:
        network = build()
    except ModelError as error:
        # Its messages begin with the argument's name, which is the key's name in the model section.
        prefix = "model." if str(error).split(" ")[0] in ModelConfig.model_fields else "model: "
        raise ModelError(f"{prefix}{error}") from error
    if network.channels != RGB:
        raise ModelError(
            f"model.backbone = {model.backbone!r} takes images of {network.channels} channels, and they are decoded as "
            "RGB; give model.options.in_chans=3, or take another backbone"
        )
    return network


def outline_network(config: Config, num_classes: int, load: bool = True) -> AdaptiveNetwork:
    """Build the outline of the configured network; what pretrained weights would fill counts as trained.

    They change no size, and the machine that plans may have no way to them. Where a file of weights is to be read, the
    network itself is built. See `adaptive.networks.create.outline_model`.

    Raises:
        ModelError: as `build_network`, or timm has no pretrained weights of the backbone.
    """
    model = config.model
    if load and model.weights:
        return build_network(config, num_classes)
    check_options(config)
    network = _checked(config, lambda: _create(outline_model, config, num_classes, model.exits))
    if load and model.pretrained:
        noted, names = _pretrained(model), network.names
        filled = [own for plain, own in names.own.items()
                  if noted.num_classes == num_classes or not plain.startswith(names.classifier)]  # fmt: skip
        network.untrained -= {name for own in filled for name in own}
    return network


def _pretrained(model: ModelConfig) -> TrainedWith:
    """Return what timm notes of a backbone's pretrained weights (raises ModelError: timm begins with random ones)."""
    noted = of_model(model)
    if noted is None:
        raise ModelError(
            f"model.pretrained = true: there are no pretrained weights of {model.backbone}; leave it out, give "
            "model.weights, or take a backbone that `adaptive models` calls pretrained"
        )
    return noted


def rebuild_network(config: Config, num_classes: int, exits: list[str]) -> AdaptiveNetwork:
    """Build the network of a trained run, whose weights are still to be loaded, on the CPU.

    Args:
        config: the run's configuration.
        num_classes: C.
        exits: the modules after which its early exits branch off, as its checkpoint names them.
    """
    return _create(create_model, config, num_classes, exits or 1)


def _create(
    create: Callable[..., AdaptiveNetwork],
    config: Config,
    num_classes: int,
    exits: int | list[str] | None,
    **start: Any,
) -> AdaptiveNetwork:
    model = config.model
    return create(
        model.backbone,
        num_classes=num_classes,
        exits=exits,
        equilibrium=model.equilibrium,
        collaboration=model.collaboration,
        input_size=config.data.image_size,
        head_width=model.head_width,
        head_dropout=model.head_dropout,
        **start,
        **model.options,
    )
