"""Checks before anything starts: what would fail later fails here, with the key and the remedy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from adaptive.config import Config
from adaptive.config_loading import differences, dump_config, load_config
from adaptive.data.index import DatasetIndex, check_shards, load_index
from adaptive.data.plan import steps_per_epoch
from adaptive.errors import CheckpointError, ConfigError, MachineError
from adaptive.files import write_atomically
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.checkpoint import Checkpoint, CheckpointStore
from adaptive.training.optimizer import check_optimizer

# Keys whose change leaves a continued run the same experiment.
FREE_ON_RESUME = {
    "train.run_folder",
    "train.resume",
    "train.max_steps",
    "train.device",
    "train.micro_batch",
    "train.zero_stage",
    "train.compile",
    "train.checkpointing",
    "train.channels_last",
    "train.max_skipped",
    "data.path",
    "data.workers",
    "evaluate.batch",
}
FREE_SECTIONS = ("tracking.", "checkpoint.", "deepspeed.")
MIB = 2**20


def check_dataset(config: Config) -> DatasetIndex:
    """Load the index and check splits, shards and class count (raises DataError or ConfigError)."""
    data = config.data
    index = load_index(data.path)
    for split in (data.train_split, data.val_split):
        check_shards(index, data.path, split)
    steps_per_epoch(index.split(data.train_split).count, config.train.global_batch)
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(index.classes):
        raise ConfigError(
            f"model.num_classes = {wanted}, but the dataset {data.path} has {len(index.classes)} classes; "
            "remove model.num_classes to take the dataset's"
        )
    check_optimizer(config.optimizer, config.train.zero_stage)
    return index


def check_run_folder(folder: Path) -> None:
    """Make sure the run folder can be written (raises MachineError)."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise MachineError(
            f"train.run_folder = {str(folder)!r} cannot be written: {error.strerror}; choose another folder"
        ) from None


def check_disk_space(folder: Path, network: AdaptiveNetwork, config: Config) -> None:
    """Refuse a run whose checkpoints cannot fit: weights, two optimizer states and an average, keep + 2 times."""
    copies = 3 + bool(config.train.ema_decay)
    size = sum(p.numel() for p in network.parameters()) * 4 * copies
    needed = size * (config.checkpoint.keep + 2)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"train.run_folder = {str(folder)!r} has {free // MIB} MiB free, the checkpoints of this run need about "
            f"{needed // MIB} MiB; free space, choose another folder, or lower checkpoint.keep"
        )


def check_exit_weights(config: Config, exits: int) -> None:
    """Check weights whose number could not be known before the exits were placed."""
    for weights in [config.train.exit_weights, *(phase.exit_weights for phase in config.phases)]:
        if weights is not None and len(weights) != exits:
            raise ConfigError(f"exit_weights = {weights} has {len(weights)} values for {exits} exits")


def find_resume_point(config: Config, index: DatasetIndex, store: CheckpointStore) -> tuple[Checkpoint | None, list]:
    """Decide from where the run starts; returns (checkpoint or None, reasons why newer ones were passed over).

    Raises:
        CheckpointError: train.resume forbids or demands a continuation that is there or not, or the run folder belongs
            to another configuration or dataset.
    """
    resume, folder = config.train.resume, Path(str(config.train.run_folder))
    existing = store.all()
    if resume == "never" and existing:
        raise CheckpointError(
            f"train.run_folder = {str(folder)!r} already holds a run; choose another folder, or train.resume=auto"
        )
    checkpoint, passed_over = store.newest_valid()
    if checkpoint is None:
        if resume == "must" or existing:
            found = "; ".join(passed_over) if passed_over else "none was ever written"
            raise CheckpointError(
                f"no valid checkpoint to continue from in {store.folder} ({found}); "
                "restore one, or choose another train.run_folder to start afresh"
            )
        return None, passed_over
    _check_same_run(config, folder)
    fingerprint = checkpoint.state()["dataset"]
    if fingerprint != index.fingerprint:
        raise CheckpointError(
            f"data.path = {config.data.path!r} is not the dataset this run began with (fingerprint "
            f"{index.fingerprint[:12]}, then {fingerprint[:12]}); use that dataset, or another train.run_folder"
        )
    return checkpoint, passed_over


def write_config(config: Config, folder: Path) -> None:
    """Keep the resolved configuration with the run."""
    write_atomically(folder / "config.yaml", dump_config(config))


def _check_same_run(config: Config, folder: Path) -> None:
    saved = folder / "config.yaml"
    if not saved.is_file():
        raise CheckpointError(f"{folder} has checkpoints but no config.yaml; restore it, or use another folder")
    changed = {
        key: values
        for key, values in differences(load_config(saved), config).items()
        if key not in FREE_ON_RESUME and not key.startswith(FREE_SECTIONS)
    }
    if changed:
        key, (then, now) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{folder} holds a run with {key} = {then!r}, now it is {now!r}{more}; "
            "keep the value to continue that run, or choose another train.run_folder"
        )
