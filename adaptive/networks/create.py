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
from adaptive.networks.cutting.cut import Cut, cut, telling_of_images
from adaptive.networks.cutting.runs import NeedsNumbersError, sample_images
from adaptive.networks.exits import EarlyExit, Exit, LastExit, describe
from adaptive.networks.fake_copy import cheap_to_run
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
    heads = _Heads(num_classes, bool(collaboration), head_width, head_dropout)
    _check_numbers(exits, num_classes)
    own = is_multi_exit(name)
    if own:
        number = number_of_exits(name, exits, head_width)
        backbone |= {} if number is None else {"exits": number}
    plain = build_backbone(name, input_size, num_classes=num_classes, pretrained=pretrained, **backbone)
    loaded = _start(plain, pretrained, weights)
    if own:
        network = assemble(plain, num_classes, equilibrium, collaboration, head_dropout, loaded)
    else:
        network = _assemble(plain, exits, heads, equilibrium, collaboration)
        _verify(plain, network)
    network.untrained -= {name for plain_name in loaded for name in network.names.own[plain_name]}
    return network.train()


def outline_model(
    name: str,
    num_classes: int = 1000,
    exits: int | list[str] | None = None,
    equilibrium: bool | str = True,
    collaboration: bool | str = True,
    *,
    input_size: int | None = None,
    head_width: int = 0,
    head_dropout: float = 0.0,
    **backbone: Any,
) -> AdaptiveNetwork:
    """Build the outline of a network: the same names, shapes and costs, on the meta device, without numbers.

    It takes hardly any time and memory, whatever the backbone's size, and cannot run. Where the backbone's code asks
    for numbers, and for MSDNet and RANet, a network on the CPU takes its place. The arguments are `create_model`'s.

    Raises:
        ModelError: as `create_model`; the logits are not compared with the plain model's.
    """
    given = {"input_size": input_size, "head_width": head_width, "head_dropout": head_dropout, **backbone}
    if not is_multi_exit(name):
        _check_numbers(exits, num_classes)
        heads = _Heads(num_classes, bool(collaboration), head_width, head_dropout)
        try:
            with torch.device("meta"):
                plain = build_backbone(name, input_size, num_classes=num_classes, **backbone)
                return _assemble(plain, exits, heads, equilibrium, collaboration).train()
        except (NeedsNumbersError, ModelError):  # mistakes are told of what is built below
            pass
    return create_model(name, num_classes, exits, equilibrium, collaboration, **given)


def _check_numbers(exits: int | list[str] | None, num_classes: int) -> None:
    if isinstance(exits, int) and exits < 1:
        raise ModelError(f"exits = {exits}: a network has at least one exit")
    if num_classes < 1:
        raise ModelError(f"num_classes = {num_classes}: the exits need at least one class")


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
    plain: Backbone, exits: int | list[str] | None, heads: _Heads, equilibrium: bool | str, collaboration: bool | str
) -> AdaptiveNetwork:
    """Cut a timm model and put an exit behind every block."""
    number = DEFAULT_EXITS if exits is None else exits
    pieces = cut(plain.model, number if isinstance(number, int) else list(number), plain.size, plain.channels)
    built = heads.build(plain, pieces)
    return AdaptiveNetwork(
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


def _verify(plain: Backbone, network: AdaptiveNetwork) -> None:
    """Compare the last exit with the plain model's logits while images are taken out at the branch points.

    One image comes to the end, and the plain model computes that one alone: this is the only arithmetic that the start
    of a large network needs, which takes two images to the first branch point, and a small one three.

    Raises:
        ModelError: the plain model does not run on such images, or the logits differ by more than 1e-5 of the largest.
    """
    batch = 3 if cheap_to_run(plain.model, plain.size) else 2
    images = sample_images(plain.model, batch, plain.size, plain.channels)
    network.eval()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), telling_of_images(plain.model, plain.size):
        expected = plain.model(images[min(len(network.blocks), batch) - 1 :])
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
    margin = TOLERANCE * float(expected.abs().max())
    if logits.shape != expected.shape or not torch.allclose(logits, expected, rtol=0, atol=margin, equal_nan=True):
        where = ", ".join(network.exit_names)
        raise ModelError(
            f"backbone = {plain.name!r}: cut after {where}, its logits differ from the plain model's; "
            "name other modules in exits"
        )
