"""Builds the adaptive network of an MSDNet or RANet, which bring exits of their own and need no cutting."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from adaptive.errors import ModelError
from adaptive.networks.backbone import Backbone, classifier_names, layer_groups
from adaptive.networks.multiscale.layers import MultiExitBackbone
from adaptive.networks.multiscale.presets import settings_of
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.timm_names import TimmNames


def is_multi_exit(name: str) -> bool:
    """Whether a name is one of the networks that bring exits of their own."""
    return settings_of(name) is not None


def number_of_exits(name: str, exits: int | list[str] | None, head_width: int) -> int | None:
    """Return the number of exits, or None for the preset's; refuse what such a network settles itself.

    Raises:
        ModelError: names of modules other than the blocks, or a head width.
    """
    if head_width:
        raise ModelError(f"head_width = {head_width}: the exits of {name} have convolutions; use head_channels")
    if not isinstance(exits, list):
        return exits
    if exits != [f"blocks.{i}" for i in range(len(exits))]:
        raise ModelError(f"exits = {exits}: the exits of {name} follow its blocks; give their number, or leave it out")
    return len(exits) + 1


def assemble(
    plain: Backbone,
    num_classes: int,
    equilibrium: bool | str,
    collaboration: bool | str,
    head_dropout: float,
    trained: Collection[str] = (),
) -> AdaptiveNetwork:
    """Put a classifier behind every block; the last one is the plain model's own.

    ``trained`` are the names of the plain model's tensors that were loaded: a classifier among them keeps its values.

    Returns:
        The network, on the CPU, in training mode, made of the plain model's modules.
    """
    model = plain.model
    assert isinstance(model, MultiExitBackbone)
    last = len(model.blocks) - 1
    link = bool(collaboration)
    exits = [model.new_exit(i, num_classes, link and i > 0, head_dropout) for i in range(last)]
    state = model.state_dict(keep_vars=True)
    model.head.drop.p = head_dropout
    if link and last > 0:
        model.head.add_link(any(name.startswith(classifier_names(model)) for name in trained))
    exits.append(model.head)
    holder = nn.ModuleDict({"blocks": model.blocks, "exits": nn.ModuleList(exits)})
    own = holder.state_dict(keep_vars=True)
    network = AdaptiveNetwork(
        list(model.blocks),
        exits,
        exit_names=[f"blocks.{i}" for i in range(last)],
        batch_dims=[model.batch_dims(i) for i in range(last + 1)],
        overwritten=[False] * last,
        names=TimmNames(own, state, classifier_names(model), layer_groups(model), set()),
        input_size=plain.size,
        channels=plain.channels,
        num_classes=num_classes,
        equilibrium=equilibrium,
        collaboration=collaboration,
    )
    return network.train()
