"""The network that a run begins with, from wherever its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from adaptive.config.sections import Config
from adaptive.networks.from_config import build_network, outline_network
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.weights.weights_file import read_header
from adaptive.training.starting.from_run import SourceRun, begin_from, open_network


class FirstNetwork(NamedTuple):
    """A network, the run that it begins from, and what the user is told of its beginning."""

    network: AdaptiveNetwork
    source: SourceRun | None = None
    told: str = ""


def first_network(config: Config, classes: Sequence[str], goes_on: bool = False, fetch: bool = True) -> FirstNetwork:
    """Build the network of a completed configuration, on the CPU; its outline to plan with, where no weights are read.

    Args:
        config: see `adaptive.training.starting.settings.complete`.
        classes: of the dataset.
        goes_on: a checkpoint's weights will take the place of all others, which are not read.
        fetch: whether pretrained weights are fetched.

    Raises:
        ModelError: the backbone cannot be built or cut like that, or the weights do not fit.
        ConfigError: the run of model.from_run is none.
    """
    if goes_on:
        return FirstNetwork((build_network if fetch else outline_network)(config, len(classes), load=False))
    if config.model.from_run:
        source, old = open_network(Path(config.model.from_run))
        network, told = begin_from(config, source, classes, old)
        return FirstNetwork(network, source, told)
    network = (build_network if fetch else outline_network)(config, len(classes))
    if config.model.weights and (other := other_classes(config.model.weights, classes)):
        # As random to these classes as a fresh one: it may learn them, and is not to be frozen before.
        network.untrained |= {n for plain, own in network.names.own.items()
                              if plain.startswith(network.names.classifier) for n in own}  # fmt: skip
        return FirstNetwork(network, told=f"model.weights = {config.model.weights!r}: {other}; the classifier is kept")
    return FirstNetwork(network)


def other_classes(weights: str, classes: Sequence[str]) -> str:
    """Say that a file which `adaptive checkpoint --export` wrote is of as many, but other classes; empty if not."""
    theirs = read_header(Path(weights)).get("classes")
    if not isinstance(theirs, list) or len(theirs) != len(classes) or list(map(str, theirs)) == list(classes):
        return ""
    mine, other = next((a, b) for a, b in zip(classes, map(str, theirs), strict=True) if a != b)
    return f"it was trained on other classes ({other!r} where this dataset has {mine!r})"
