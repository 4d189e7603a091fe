"""`load`: reads a run folder as a trained network with its configuration, classes and transforms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from adaptive.config.loading import load_config
from adaptive.config.sections import Config
from adaptive.data.images.transforms import eval_transform
from adaptive.errors import CheckpointError
from adaptive.networks.from_config import rebuild_network
from adaptive.networks.network import AdaptiveNetwork
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


def load(folder: str | Path, which: str = "best", averaged: bool | None = None) -> TrainedRun:
    """Load a run folder's network.

    Args:
        folder: the run folder that ``adaptive train`` wrote.
        which: ``best`` (by validation; the newest where nothing was validated), ``last``, or a step number.
        averaged: take the moving average's weights; by default where the run kept one.

    Raises:
        CheckpointError: no such run, no valid checkpoint, or no moving average where one is asked for.
    """
    folder = Path(folder)
    config = run_config(folder)
    checkpoint = _choose(CheckpointStore(folder / "checkpoints"), which)
    state = checkpoint.state()
    average = checkpoint.tensors("ema")
    if averaged and not average:
        raise CheckpointError(f"{checkpoint.path} holds no moving average (train.ema_decay was 0)")
    use_average = bool(average) if averaged is None else averaged
    network = rebuild_network(config, len(state["classes"]), state["exits"])
    network.load_state_dict(average if use_average else checkpoint.tensors("weights"))
    network.collaboration = state["collaboration"]  # links that the checkpoint's phase left out were never trained
    return TrainedRun(
        folder=folder,
        config=config,
        network=network.eval(),
        classes=list(state["classes"]),
        transform=eval_transform(config.data),
        checkpoint=checkpoint,
        dataset=state["dataset"],
        averaged=use_average,
    )


def run_config(folder: Path) -> Config:
    """Read a run's configuration (raises CheckpointError where there is no run)."""
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise CheckpointError(f"{folder} is no run folder: it has no config.yaml; give the folder that train wrote")
    return load_config(config_file)


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
