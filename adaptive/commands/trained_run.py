"""What the commands on a trained run share: their arguments, and every exit's outputs over a split."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from adaptive.inference.outputs import Outputs
    from adaptive.inference.policy import NetworkIdentity, Policy
    from adaptive.runs import TrainedRun


def add_weights(parser: argparse.ArgumentParser) -> None:
    """Declare which weights of a run are taken."""
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help="best (default), last, or a step number")
    parser.add_argument("--weights", choices=("auto", "plain", "ema"), default="auto", help="auto: ema where kept")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare where to run."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Declare how images are read and run."""
    parser.add_argument("--data", metavar="FOLDER", help="packed dataset or its URL; by default the run's")
    parser.add_argument("--batch", type=int, help="images per forward pass; by default evaluate.batch of the run")
    parser.add_argument("--workers", type=int, help="loader processes; by default data.workers of the run")
    add_device(parser)


def load_run(folder: str, checkpoint: str, weights: str) -> TrainedRun:
    """Load a run's network, as ``--checkpoint`` and ``--weights`` say (raises CheckpointError)."""
    from adaptive.runs import load

    return load(folder, checkpoint, {"auto": None, "plain": False, "ema": True}[weights])


def check_loading(arguments: argparse.Namespace) -> None:
    """Refuse sizes that make no sense, before anything is loaded (raises AdaptiveError)."""
    from adaptive.errors import AdaptiveError

    for name in ("batch", "workers"):
        value = getattr(arguments, name)
        if value is not None and value < (name == "batch"):
            raise AdaptiveError(f"--{name} {value} is too small; give {int(name == 'batch')} or more")


def choose_device(name: str) -> torch.device:
    """Return the device that ``--device`` names (raises MachineError)."""
    import torch

    from adaptive.errors import MachineError

    usable = torch.cuda.is_available()
    if name == "cuda" and not usable:
        raise MachineError(f"--device {name}: this machine has no usable GPU; use cpu or auto")
    return torch.device("cuda" if usable and name != "cpu" else "cpu")


def collect_outputs(
    trained: TrainedRun,
    folder: str | None,
    split: str,
    batch: int | None,
    workers: int | None,
    device: str,
    flag: str = "--split",
) -> Outputs:
    """Run every exit over a split of a packed dataset.

    Args:
        trained: the network; it is moved to the device.
        folder: of the dataset, or its URL; by default the run's.
        split: its name.
        batch: images per forward pass; by default evaluate.batch of the run.
        workers: loader processes; by default data.workers of the run.
        device: auto, cpu or cuda.
        flag: flag or key that gave the split, for messages.

    Raises:
        DataError: no such dataset or split, other classes than the run's, or images that cannot be read.
        MachineError: no such device.
    """
    from adaptive.data.reading.stream import EvaluationStream, LoaderOptions
    from adaptive.data.shards.index import check_shards, check_split, load_index
    from adaptive.errors import DataError
    from adaptive.inference.outputs import collect
    from adaptive.networks.precision import autocast

    config = trained.config
    data = config.data.model_copy(update={"path": folder or config.data.path})
    index = load_index(data.path, data)
    check_split(index, flag, split)
    check_shards(index, data.path, split, settings=data)
    if index.classes != trained.classes:
        raise DataError(f"{data.path} has other classes than {trained.folder} was trained on; give --data its dataset")
    where = choose_device(device)
    network = trained.network.to(where)
    loader = LoaderOptions(workers=data.workers if workers is None else workers, device=where)
    stream = EvaluationStream(index, data, split, loader, batch=batch or config.evaluate.batch)
    with autocast(config.train.precision, where):
        return collect(network, stream, where, stream.total)


def left_out_words(by_kind: Mapping[str, int]) -> str:
    """Return what to append to a number of images where bad ones are not among them."""
    from adaptive.data.faults import counted

    if not by_kind:
        return ""
    return f"; {sum(by_kind.values())} bad ones left out ({counted(by_kind)})"


def identity(trained: TrainedRun) -> NetworkIdentity:
    """Say which network this is, as a policy remembers it."""
    from adaptive.inference.policy import NetworkIdentity
    from adaptive.networks.fingerprint import fingerprint

    return NetworkIdentity(
        backbone=trained.config.model.backbone,
        exits=trained.network.exit_names,
        fingerprint=fingerprint(trained.network),
    )


def load_policy(path: str, trained: TrainedRun) -> Policy:
    """Read a policy and refuse one that was calibrated for another network (raises PolicyError)."""
    from adaptive.errors import PolicyError
    from adaptive.inference.policy import Policy

    policy = Policy.load(path)
    own = identity(trained)
    if policy.exits != len(trained.network.exits):
        raise PolicyError(
            f"policy {path} is for {policy.exits} exits, {trained.folder} has {len(trained.network.exits)}; "
            f"calibrate: adaptive calibrate {trained.folder} --budget 0.5"
        )
    if policy.network is not None and policy.network != own:
        same = policy.network.backbone == own.backbone and policy.network.exits == own.exits
        theirs = "other weights" if same else f"another network ({policy.network.backbone})"
        raise PolicyError(
            f"policy {path} was calibrated for {theirs} than {trained.folder}'s {trained.checkpoint.path.name}; "
            f"calibrate again: adaptive calibrate {trained.folder} --budget 0.5"
        )
    return policy
