"""`create_model`: an early-exit network from the name of a timm model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.errors import ModelError
from adaptive.networks.backbone import (
    Backbone,
    build_backbone,
    classifier_names,
    classifier_width,
    layer_groups,
    spared_from_decay,
)
from adaptive.networks.cutting.cut import Cut, cut, sample_images
from adaptive.networks.exits import EarlyExit, Exit, LastExit, describe
from adaptive.networks.multiscale.assemble import assemble, is_multi_exit, number_of_exits
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.state import State
from adaptive.networks.timm_names import TimmNames
from adaptive.networks.weights.initial_weights import left_fresh, load_file, load_state

TOLERANCE = 1e-5  # of the largest logit
DEFAULT_EXITS = 4  # of a timm model


def create_model(
    name: str,
    num_classes: int = 1000,
    exits: int | list[str] | None = None,
    equilibrium: bool | str = True,
    collaboration: bool | str = True,
    pretrained: bool = False,
    *,
    input_size: int | None = None,
    head_width: int = 0,
    head_dropout: float = 0.0,
    weights: str | Path | Mapping[str, Tensor] | None = None,
    **backbone: Any,
) -> AdaptiveNetwork:
    """Build a network with early exits.

    Args:
        name: any timm model, those of this project (``msdnet``, ``ranet`` and their presets) included.
        num_classes: C.
        exits: number of exits, placed at equal shares of the backbone's MACs, or the names of the modules after which
            the early ones branch off; the last exit is always the backbone's own end. By default 4, or what the
            preset of an MSDNet or RANet has.
        equilibrium: Gradient Equilibrium; True or ``"crossing"``, ``"tap"``, or False.
        collaboration: whether each exit also reads the previous exit's prediction; ``"attached"`` lets gradients flow
            back through that, only to reproduce the released code.
        pretrained: start from timm's pretrained weights.
        input_size: side of the square images in pixels; by default the backbone's own.
        head_width: width of a pointwise layer in front of an early exit's pooling; 0 leaves it out.
        head_dropout: dropout in front of an early exit's classifier.
        weights: file of weights to start the backbone from (see `adaptive.networks.weights.weights_file.read_weights`),
            or a plain timm model's state_dict; a classifier of another class count is left out.
        backbone: further arguments of timm.create_model; for ``msdnet`` and ``ranet`` all their settings.

    Returns:
        The network, on the CPU, in training mode. ``net(images)`` gives the k logits, each (N, C).

    Raises:
        ModelError: no such backbone or module, a number out of range, or a backbone that cannot be cut.
    """
    if isinstance(exits, int) and exits < 1:
        raise ModelError(f"exits = {exits}: a network has at least one exit")
    if num_classes < 1:
        raise ModelError(f"num_classes = {num_classes}: the exits need at least one class")
    own = is_multi_exit(name)
    if own:
        number = number_of_exits(name, exits, head_width)
        backbone |= {} if number is None else {"exits": number}
    plain = build_backbone(name, input_size, num_classes=num_classes, pretrained=pretrained, **backbone)
    loaded = _start(plain, pretrained, weights)
    if own:
        network = assemble(plain, num_classes, equilibrium, collaboration, head_dropout, loaded)
    else:
        heads = _Heads(num_classes, bool(collaboration), head_width, head_dropout)
        network = _assemble(plain, DEFAULT_EXITS if exits is None else exits, heads, equilibrium, collaboration)
    network.untrained -= {name for plain_name in loaded for name in network.names.own[plain_name]}
    return network


def _start(plain: Backbone, pretrained: bool, weights: str | Path | Mapping[str, Tensor] | None) -> set[str]:
    """Give a plain model its first weights; returns the names of the tensors that are not random any more."""
    if isinstance(weights, Mapping):
        fresh = load_state(plain, weights, "weights")
    elif weights is not None:
        fresh = load_file(plain, Path(weights))
    elif pretrained:
        fresh = left_fresh(plain)
    else:
        return set()
    return plain.model.state_dict().keys() - fresh


@dataclass(frozen=True)
class _Heads:
    """How the exits of a timm model are built."""

    num_classes: int
    links: bool
    width: int
    dropout: float

    def build(self, plain: Backbone, pieces: Cut) -> list[Exit]:
        """One exit behind every block; the last one is the backbone's own end."""
        features = [describe(point.shape_with_batch, plain.model) for point in pieces.branch_points]
        heads: list[Exit] = [
            EarlyExit(feature, self.num_classes, self.links and i > 0, self.width, self.dropout)
            for i, feature in enumerate(features)
        ]
        link_width = classifier_width(plain.model) if self.links and features else 0
        names = tuple(name.removesuffix(".") for name in classifier_names(plain.model))
        return [*heads, LastExit(pieces.head, self.num_classes, link_width, names)]


def _assemble(
    plain: Backbone, exits: int | list[str], heads: _Heads, equilibrium: bool | str, collaboration: bool | str
) -> AdaptiveNetwork:
    """Cut a timm model, put an exit behind every block, and compare the whole with the plain model."""
    images = sample_images(plain.model, 3, plain.size, plain.channels)
    pieces = cut(plain.model, exits if isinstance(exits, int) else list(exits), plain.size, plain.channels)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = plain.model.eval()(images)
    built = heads.build(plain, pieces)
    network = AdaptiveNetwork(
        [*pieces.blocks],
        built,
        exit_names=[point.name for point in pieces.branch_points],
        batch_dims=pieces.batch_dims,
        overwritten=pieces.overwritten,
        names=_names(plain, pieces, built),
        input_size=plain.size,
        channels=plain.channels,
        num_classes=heads.num_classes,
        equilibrium=equilibrium,
        collaboration=collaboration,
    )
    verify(plain.name, network, images, expected)
    return network.train()


def _names(plain: Backbone, pieces: Cut, heads: list[Exit]) -> TimmNames:
    """Match names, and make sure that every tensor has exactly one home (raises ModelError)."""
    model: Any = plain.model
    parts = [*pieces.blocks, *heads]
    homes: dict[int, set[int]] = {}
    for i, part in enumerate(parts):
        for tensor in part.state_dict(keep_vars=True).values():
            homes.setdefault(id(tensor), set()).add(i)
    state = model.state_dict(keep_vars=True)
    for key, tensor in state.items():
        if len(homes.get(id(tensor), ())) != 1:
            where = ", ".join(point.name for point in pieces.branch_points)
            raise ModelError(
                f"backbone = {plain.name!r}: cut after {where}, {key} is needed in several blocks; "
                "name other modules in exits"
            )
    holder = nn.ModuleDict({"blocks": nn.ModuleList(pieces.blocks), "exits": nn.ModuleList(heads)})
    own = holder.state_dict(keep_vars=True)
    return TimmNames(own, state, classifier_names(model), layer_groups(model), spared_from_decay(model))


def verify(name: str, network: AdaptiveNetwork, images: Tensor, expected: Tensor) -> None:
    """Compare the last exit with the plain model's logits while samples are taken out at the branch points.

    Args:
        name: of the backbone, for the message.
        network: on the CPU; put into eval mode.
        images: (N, C, H, W).
        expected: (N, classes), the plain model's logits in eval mode.

    Raises:
        ModelError: they differ by more than 1e-5 of the largest logit.
    """
    network.eval()
    collaboration, network.collaboration = network.collaboration, False
    left = torch.arange(len(images))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        state: State = network.start(images)
        for i in range(len(network.blocks)):
            state = network.run_block(i, state)
            if i < len(network.blocks) - 1 and len(left) > 1:
                state = state.select(torch.arange(1, len(left)), len(left))
                left = left[1:]
        logits = network.run_exit(len(network.exits) - 1, state)
    network.collaboration = collaboration
    wanted = expected[left]
    margin = TOLERANCE * float(wanted.abs().max())
    if logits.shape != wanted.shape or not torch.allclose(logits, wanted, rtol=0, atol=margin, equal_nan=True):
        where = ", ".join(network.exit_names)
        raise ModelError(
            f"backbone = {name!r}: cut after {where}, its logits differ from the plain model's; "
            "name other modules in exits"
        )
