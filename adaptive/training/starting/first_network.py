"""The network that a run begins with, from wherever its configuration says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from adaptive.config.sections import Config
from adaptive.networks.from_config import build_network, outline_network
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.starting.from_run import SourceRun, begin_from, open_run


class FirstNetwork(NamedTuple):
    """A network, and the run that it begins from with what was taken of it."""

    network: AdaptiveNetwork
    source: SourceRun | None = None
    told: str = ""


def first_network(config: Config, classes: Sequence[str], goes_on: bool = False, fetch: bool = True) -> FirstNetwork:
    """Build the network of a completed configuration, on the CPU.

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
        return FirstNetwork(build_network(config, len(classes), load=False))
    if config.model.from_run:
        source = open_run(Path(config.model.from_run))
        network, told = begin_from(config, source, classes)
        return FirstNetwork(network, source, told)
    return FirstNetwork((build_network if fetch else outline_network)(config, len(classes)))
