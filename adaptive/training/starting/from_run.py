"""Begins a run from another run's trained network, with all its exits and links (``model.from_run``).

Of the other run's folder its checkpoint and, of its configuration, the architecture and the preparation of images are
read; no path, permission or schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.config.saved import for_inference, read_saved
from adaptive.config.sections import Config, ModelConfig
from adaptive.errors import CheckpointError, ConfigError, ModelError, reason_of
from adaptive.networks.from_config import build_network, rebuild_network
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.checkpoints.reading import read_chosen
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore, newest_or_refuse
from adaptive.training.phases import plan_phase, reset_classifiers
from adaptive.training.starting.frozen import still_random

# Options of timm.create_model that change no weight's meaning: the image size is resampled, rates are of training.
FREE_OPTIONS = ("img_size", "drop_rate", "drop_path_rate", "drop_block_rate", "proj_drop_rate", "attn_drop_rate",
                "pos_drop_rate", "patch_drop_rate", "head_dropout")  # fmt: skip


@dataclass(frozen=True)
class SourceRun:
    """A trained run to begin from: its configuration, and the checkpoint that `adaptive.load` would take.

    ``said`` is the configuration as the run's folder has it; of ``config``, without what a run may not decide for
    others, the network is built.
    """

    folder: Path
    said: Config
    config: Config
    checkpoint: Checkpoint

    @cached_property
    def state(self) -> dict[str, Any]:
        """The plain values of its checkpoint."""
        return self.checkpoint.state()

    @cached_property
    def averaged(self) -> bool:
        """Whether it kept a moving average, whose weights are taken then."""
        return (self.checkpoint.path / "ema.safetensors").is_file()

    @property
    def exits(self) -> list[str] | int:
        """Its early exits as model.exits names them."""
        return list(self.state["exits"]) or 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole network's weights."""
        return self.checkpoint.tensors("ema" if self.averaged else "weights")

    def provenance(self) -> dict[str, Any]:
        """Return what a run records of where it began."""
        return {
            "run": str(self.folder),
            "checkpoint": self.checkpoint.path.name,
            "step": self.checkpoint.step,
            "score": self.checkpoint.score,
            "averaged": self.averaged,
            "dataset": self.state["dataset"],
        }


def _read_values(source: SourceRun) -> None:
    """Read what `complete` asks for, all of one checkpoint."""
    _ = (source.state, source.averaged)


def open_run(folder: Path, read: Callable[[SourceRun], None] = _read_values) -> SourceRun:
    """Find a run's best checkpoint (the newest, where nothing was validated), and read its plain values.

    Args:
        folder: of the run.
        read: what else is to be of the same checkpoint; see `read_chosen`.

    Raises:
        ConfigError: there is no run, or none of its checkpoints is valid.
    """
    where = f"model.from_run = {str(folder)!r}"
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{where} is no run folder: it has no config.yaml; give the folder that train wrote")
    store = CheckpointStore(folder / "checkpoints")
    try:
        # The folder may be anybody's: what it permits or names as a place to read from does not count.
        said = read_saved(folder / "config.yaml")
        config = for_inference(said, folder)

        def opened(checkpoint: Checkpoint) -> SourceRun:
            source = SourceRun(folder, said, config, checkpoint)
            read(source)
            return source

        return read_chosen(store, lambda: store.best() or newest_or_refuse(store), opened)
    except CheckpointError as error:
        raise ConfigError(f"{where}: {error}") from error


def take_architecture(model: ModelConfig, source: SourceRun) -> ModelConfig:
    """Return the model section with what it leaves open filled in from a run (raises ConfigError where they differ)."""
    theirs = source.config.model
    given = model.model_fields_set
    exits = model.exits if model.exits is not None else source.exits
    same = exits == len(source.state["exits"]) + 1 if isinstance(exits, int) else exits == source.exits
    links = model.collaboration if "collaboration" in given else theirs.collaboration
    width = model.head_width if "head_width" in given else theirs.head_width
    for key, mine, other, fits in (
        ("backbone", model.backbone, theirs.backbone, model.backbone == theirs.backbone),
        ("exits", model.exits, source.exits, same),
        ("head_width", width, theirs.head_width, width == theirs.head_width),
        ("collaboration", links, theirs.collaboration, bool(links) == bool(theirs.collaboration)),
        *_options(model.options, theirs.options),
    ):
        if not fits:
            raise ConfigError(
                f"model.{key} = {mine!r}, but the network of model.from_run = {str(source.folder)!r} has {other!r}; "
                f"leave model.{key} out to take that"
            )
    options = {key: value for key, value in theirs.options.items() if key != "img_size"} | model.options
    update = {"exits": source.exits, "head_width": width, "collaboration": links, "options": options}
    return model.model_copy(update=update)


def _options(mine: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, Any, Any, bool]]:
    return [
        (f"options.{key}", value, theirs.get(key), value == theirs.get(key))
        for key, value in mine.items()
        if key not in FREE_OPTIONS
    ]


def open_network(folder: Path) -> tuple[SourceRun, AdaptiveNetwork]:
    """Find a run's best checkpoint, and build its own network with the weights (raises as `open_run`, ModelError)."""
    built: list[tuple[AdaptiveNetwork, set[str]]] = []  # which takes long, and is done once

    def read(source: SourceRun) -> None:
        if not built:
            with torch.random.fork_rng(devices=[]):
                old = rebuild_network(source.config, len(source.state["classes"]), source.state["exits"])
            built.append((old, set(old.untrained)))
        network, untrained = built[0]
        network.untrained = set(untrained)
        _fill(network, source)

    return open_run(folder, read), built[0][0]


def begin_from(
    config: Config, source: SourceRun, classes: Sequence[str], old: AdaptiveNetwork
) -> tuple[AdaptiveNetwork, str]:
    """Build the configured network with a run's weights, on the CPU.

    The backbone is resampled to another image size as timm does with pretrained weights. Where the classes differ, the
    exits' last linear layers and links start afresh.

    Args:
        config: the new run's, completed (see `take_architecture`).
        source: where it begins.
        classes: names of the new run's.
        old: the run's own network, see `open_network`.

    Returns:
        The network, and a line that says what was taken.

    Raises:
        ModelError: the weights do not fit.
    """
    theirs = list(source.state["classes"])
    network = build_network(config, len(classes), weights=old.backbone_state_dict())
    fresh = set() if theirs == list(classes) else _classifier_names(network)
    if fresh and len(theirs) == len(classes):
        reset_classifiers(network, config.train.seed)
    own = network.state_dict()
    taken = {
        name: tensor
        for name, tensor in old.state_dict().items()
        if name not in network.names.plain and name not in fresh
    }
    if wrong := [name for name, tensor in taken.items() if name not in own or own[name].shape != tensor.shape]:
        raise ModelError(
            f"model.from_run = {str(source.folder)!r}: {wrong[0]} has no place in this network; take the run's "
            "architecture, with model.exits, head_width and options left out"
        )
    network.load_state_dict({**own, **taken})
    network.untrained = fresh | old.untrained
    if not source.state["collaboration"]:  # its links, if any, are not of the network as it was trained last
        network.untrained |= {name for name in own if ".link." in name}
    return network, _told(source, theirs, list(classes), old, network)


def _fill(old: AdaptiveNetwork, source: SourceRun) -> None:
    """Load a run's weights into its own network, which then knows which of its parts never learned."""
    try:
        old.load_state_dict(source.tensors())
    except RuntimeError as error:
        raise ModelError(f"model.from_run = {str(source.folder)!r}: {reason_of(error)}") from error
    model = source.said.model
    if model.pretrained or model.weights or model.from_run:
        backbone = {name for name in old.untrained if name in old.names.plain}
        old.untrained = set() if model.from_run else old.untrained - backbone
    plans = [plan_phase(source.config, phase, len(old.exits)) for phase in source.config.resolved_phases()]
    old.untrained = still_random(old, plans[: source.checkpoint.phase + 1])


def _classifier_names(network: AdaptiveNetwork) -> set[str]:
    """Return the names of all tensors of the exits' last linear layers and links."""
    modules: list[nn.Module] = network.classifiers()
    tensors = {id(tensor) for module in modules for tensor in module.state_dict(keep_vars=True).values()}
    return {name for name, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in tensors}


def _told(
    source: SourceRun, theirs: list[str], classes: list[str], old: AdaptiveNetwork, network: AdaptiveNetwork
) -> str:
    """Say in one line what was taken, what was resized, and what starts afresh."""
    kind = "averaged weights" if source.averaged else "weights"
    told = [f"begins from {source.folder}: {kind} of {source.checkpoint.path.name}, with all exits and links"]
    if old.input_size != network.input_size:
        told.append(f"resampled from {old.input_size} to {network.input_size} pixels where that changes a shape")
    if theirs != classes:
        number = len(theirs) != len(classes)
        others = f"{len(theirs)} classes" if number else f"classes ({theirs[0]!r}, ...)"
        here = f"the {len(classes)}" if number else "those"
        first = "" if number else f" ({classes[0]!r}, ...)"
        told.append(f"its {others} are not {here} here{first}: the exits' last layers and links start afresh")
    return "; ".join(told)
