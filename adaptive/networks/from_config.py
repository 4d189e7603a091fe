"""Builds the network that a configuration describes: to be trained, or to load a checkpoint's weights into."""

from __future__ import annotations

from typing import Any

import torch

from adaptive.config.sections import Config, ModelConfig
from adaptive.errors import ModelError
from adaptive.networks.create import create_model
from adaptive.networks.network import AdaptiveNetwork


def build_network(config: Config, num_classes: int) -> AdaptiveNetwork:
    """Build the configured network with the seed's initial weights, or the pretrained ones, on the CPU.

    Raises:
        ModelError: the backbone cannot be built or cut like that; the message names the key.
    """
    model = config.model
    torch.manual_seed(config.train.seed)
    try:
        return _create(config, num_classes, model.exits, pretrained=model.pretrained, weights=model.weights)
    except ModelError as error:
        # Its messages begin with the argument's name, which is the key's name in the model section.
        prefix = "model." if str(error).split(" ")[0] in ModelConfig.model_fields else "model: "
        raise ModelError(f"{prefix}{error}") from error


def rebuild_network(config: Config, num_classes: int, exits: list[str]) -> AdaptiveNetwork:
    """Build the network of a trained run, whose weights are still to be loaded, on the CPU.

    Args:
        config: the run's configuration.
        num_classes: C.
        exits: the modules after which its early exits branch off, as its checkpoint names them.
    """
    return _create(config, num_classes, exits or 1)


def _create(config: Config, num_classes: int, exits: int | list[str] | None, **start: Any) -> AdaptiveNetwork:
    model = config.model
    return create_model(
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
