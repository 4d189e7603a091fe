"""A finished run: its trained network with configuration, classes and transforms, its policies and outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from adaptive.config.saved import for_inference, read_saved
from adaptive.config.sections import Config
from adaptive.data.images.transforms import eval_transform
from adaptive.data.shards.index import check_shards, check_split, load_index
from adaptive.errors import CheckpointError, DataError, reason_of, told_refusals
from adaptive.foreign_text import shown_location
from adaptive.inference.checks import check_policy, read_policy
from adaptive.inference.in_sample import InSample, policy_on
from adaptive.inference.outputs import Outputs, collect
from adaptive.inference.policy import NetworkIdentity, Policy
from adaptive.networks.from_config import rebuild_network
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast
from adaptive.networks.weights.fingerprint import fingerprint
from adaptive.training.checkpoints.reading import read_chosen
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore, newest_or_refuse, verify


@dataclass(frozen=True)
class TrainedRun:
    """A trained network, in eval mode on the CPU, and what belongs to it."""

    folder: Path
    config: Config
    network: AdaptiveNetwork
    classes: list[str]
    transform: Callable[[Image.Image], Tensor]
    checkpoint: Checkpoint
    dataset: str
    averaged: bool
    identity: NetworkIdentity
    """What a policy remembers of the network that it was calibrated for."""


class _RunState(BaseModel):
    """What a checkpoint says of its network, as far as it is needed to build it again."""

    model_config = ConfigDict(strict=True)

    classes: list[str]
    exits: list[str]
    collaboration: bool | Literal["attached"]
    dataset: str


@told_refusals(CheckpointError)
def load(
    folder: str | Path, which: str = "best", averaged: bool | None = None, overrides: Sequence[str] = ()
) -> TrainedRun:
    """Load a run folder's network.

    The folder may be anybody's: what its configuration permits or names as a place to write to does not count; see
    `adaptive.config.saved.for_inference`.

    Args:
        folder: the run folder that ``adaptive train`` wrote.
        which: ``best`` (by validation; the newest where nothing was validated), ``last``, or a step number.
        averaged: take the moving average's weights; by default where the run kept one.
        overrides: ``key=value``, what the user says of reading the run's data: ``data.pipe=true`` allows a command.

    Raises:
        CheckpointError: no such run, no valid checkpoint, or no moving average where one is asked for.
    """
    folder = Path(folder)
    config = run_config(folder, overrides)
    store = CheckpointStore(folder / "checkpoints")
    built: dict[tuple[int, tuple[str, ...]], AdaptiveNetwork] = {}  # which takes long, and is done once

    def read(checkpoint: Checkpoint) -> TrainedRun:
        state = _state(checkpoint)
        average = checkpoint.tensors("ema")
        if averaged and not average:
            raise CheckpointError(f"{checkpoint.path} holds no moving average (train.ema_decay was 0)")
        use_average = bool(average) if averaged is None else averaged
        shape = (len(state.classes), tuple(state.exits))
        if shape not in built:
            built[shape] = rebuild_network(config, len(state.classes), state.exits)
        network = built[shape]
        _fill(network, average if use_average else checkpoint.tensors("weights"), checkpoint, folder)
        network.collaboration = bool(state.collaboration)  # links that the phase left out were never trained
        return TrainedRun(
            folder=folder,
            config=config,
            network=network.eval(),
            classes=state.classes,
            transform=eval_transform(config.data),
            checkpoint=checkpoint,
            dataset=state.dataset,
            averaged=use_average,
            identity=NetworkIdentity(
                backbone=config.model.backbone, exits=network.exit_names, fingerprint=fingerprint(network)
            ),
        )

    return read_chosen(store, lambda: _choose(store, which), read)


def _fill(network: AdaptiveNetwork, weights: dict[str, Tensor], checkpoint: Checkpoint, folder: Path) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = reason_of(str(error).partition("\n")[2] or error, 200)
        raise CheckpointError(
            f"{checkpoint.path} does not fit the network of {folder / 'config.yaml'}: {reason}; give an intact copy"
        ) from None


def run_config(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration, as far as the run decides, changed by ``overrides``.

    Raises:
        CheckpointError: there is no run.
        ConfigError: the configuration or an override is wrong.
    """
    return for_inference(said_config(folder), folder, overrides)


@told_refusals(CheckpointError)
def said_config(folder: Path) -> Config:
    """Read what a run's configuration says, which is not to be acted upon (raises as `run_config` does)."""
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no config.yaml; give the folder that train wrote")
    return read_saved(config_file)


def _state(checkpoint: Checkpoint) -> _RunState:
    try:
        return _RunState.model_validate(checkpoint.state())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "content"
        raise CheckpointError(
            f"{checkpoint.path / 'state.json'}: {where}: {first['msg']}; give an intact copy of the run"
        ) from None


def load_policy(path: str, trained: TrainedRun) -> Policy:
    """Read a policy and refuse one of another network (raises PolicyError)."""
    policy = read_policy(path, len(trained.network.exits))
    check_policy(
        policy,
        trained.network.exit_names,
        lambda: trained.identity.fingerprint,
        name=f"policy {path}",
        owner=f"{trained.folder}'s {trained.checkpoint.path.name}",
        run=str(trained.folder),
    )
    return policy


def named(policy: Policy, trained: TrainedRun, folder: str | None = None) -> Policy:
    """Return a policy that remembers its network, and the dataset (by default the run's) that it was calibrated on."""
    data = trained.config.data
    calibration = policy.calibration
    if calibration is not None:
        calibration = calibration.model_copy(update={"dataset": load_index(folder or data.path, data).fingerprint})
    return policy.model_copy(update={"network": trained.identity, "calibration": calibration})


def in_sample(
    trained: TrainedRun, split: str, folder: str | None = None, policy: Policy | None = None, which: str = "best"
) -> InSample:
    """Say what the images of a split have chosen: the run's checkpoint, by its validation, or a policy.

    Args:
        trained: the run.
        split: that is measured.
        folder: of the dataset, or its URL; by default the run's.
        policy: that is measured; of this network.
        which: as `load` was told: a checkpoint that was named by its step was not chosen.

    Raises:
        DataError: no such dataset.
    """
    data = trained.config.data
    fingerprint = load_index(folder or data.path, data).fingerprint
    found = policy_on(policy, split, fingerprint, trained.dataset)
    validated = which == "best" and trained.checkpoint.score is not None
    return replace(found, checkpoint=validated and (split, fingerprint) == (data.val_split, trained.dataset))


def collect_outputs(
    trained: TrainedRun,
    split: str,
    folder: str | None = None,
    batch: int | None = None,
    workers: int | None = None,
    device: torch.device | None = None,
    flag: str = "--split",
) -> Outputs:
    """Run every exit over a split of a packed dataset.

    Args:
        trained: the network; it is moved to the device.
        split: its name.
        folder: of the dataset, or its URL; by default the run's.
        batch: images per forward pass; by default evaluate.batch of the run.
        workers: loader processes; by default data.workers of the run.
        device: by default the CPU.
        flag: flag or key that gave the split, for messages.

    Raises:
        DataError: no such dataset or split, other classes than the run's, or images that cannot be read.
    """
    from adaptive.data.reading.stream import (  # webdataset, which other uses of a run do without
        EvaluationStream,
        LoaderOptions,
    )

    config = trained.config
    data = config.data.model_copy(update={"path": folder or config.data.path})
    index = load_index(data.path, data)
    check_split(index, flag, split)
    check_shards(index, data.path, split, settings=data)
    if index.classes != trained.classes:
        raise DataError(
            f"{shown_location(data.path)} has other classes than {trained.folder} was trained on; give --data its "
            "dataset"
        )
    device = device or torch.device("cpu")
    network = trained.network.to(device)
    loader = LoaderOptions(workers=data.workers if workers is None else workers, device=device)
    stream = EvaluationStream(index, data, split, loader, batch=batch or config.evaluate.batch)
    with autocast(config.train.precision, device):
        return collect(network, stream, device, stream.total)


def first_images(trained: TrainedRun, split: str, folder: str | None, count: int, flag: str = "--split") -> Tensor:
    """Read the first images of a split, as the network takes them: (N, C, H, W) on the CPU, at most ``count``.

    Args:
        trained: of whose dataset.
        split: its name.
        folder: of the dataset, or its URL; by default the run's.
        count: how many.
        flag: flag or key that gave the split, for messages.

    Raises:
        DataError: no such dataset or split, or images that cannot be read.
    """
    from adaptive.data.reading import first_images as reading  # webdataset, as above

    data = trained.config.data.model_copy(update={"path": folder or trained.config.data.path})
    return reading.first_images(load_index(data.path, data), data, split, count, flag)[0]


def _choose(store: CheckpointStore, which: str) -> Checkpoint:
    if which == "last":
        return newest_or_refuse(store)
    if which == "best":
        return store.best() or newest_or_refuse(store)
    found = [c for c in store.all() if which.isdigit() and c.step == int(which)]
    if not found:
        steps = ", ".join(str(c.step) for c in store.all()) or "none"
        raise CheckpointError(
            f"{store.folder} has no checkpoint {which!r}; use best, last, or one of the steps {steps}"
        )
    fault = verify(found[0].path)
    if fault:
        raise CheckpointError(f"{found[0].path} is damaged: {fault}")
    return found[0]
