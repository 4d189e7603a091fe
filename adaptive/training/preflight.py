"""Checks before anything starts: what would fail later fails here, with the key and the remedy."""

from __future__ import annotations

import difflib
import os
import shutil
from pathlib import Path

import timm

from adaptive.config import Config
from adaptive.config_checks import check_exit_weights as check_exit_weights  # the run finds all its checks here
from adaptive.config_loading import differences, dump_config, load_config
from adaptive.data.index import DatasetIndex, check_shards, load_index
from adaptive.data.plan import steps_per_epoch
from adaptive.data.transforms import Mixer, train_transform
from adaptive.errors import CheckpointError, ConfigError, DataError, MachineError
from adaptive.files import write_atomically
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.batch import BatchSizes
from adaptive.training.checkpoint import Checkpoint, CheckpointStore
from adaptive.training.engine import check_deepspeed_section
from adaptive.training.optimizer import build_optimizer, build_scheduler, check_optimizer
from adaptive.training.phases import plan_phase

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
    try:
        index = load_index(data.path)
        for key in ("train_split", "val_split"):
            check_split(index, f"data.{key}", getattr(data, key))
            check_shards(index, data.path, getattr(data, key))
    except DataError as error:
        raise DataError(f"data.path = {data.path!r}: {error}") from None
    steps_per_epoch(index.split(data.train_split).count, config.train.global_batch)
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(index.classes):
        raise ConfigError(
            f"model.num_classes = {wanted}, but the dataset {data.path} has {len(index.classes)} classes; "
            "remove model.num_classes to take the dataset's"
        )
    check_optimizer(config.optimizer, config.train.zero_stage)
    return index


def check_split(index: DatasetIndex, key: str, name: str) -> None:
    """Refuse a split that the dataset lacks; ``key`` is the configuration key or flag that names it (DataError)."""
    if name not in index.splits:
        close = difflib.get_close_matches(name, index.splits, n=1)
        remedy = f"did you mean {close[0]}? " if close else ""
        raise DataError(
            f"{key} = {name!r} is no split of the dataset; {remedy}it has {', '.join(sorted(index.splits))}"
        )


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


def check_teacher(config: Config) -> None:
    """Refuse a teacher that timm does not know (raises ConfigError with the nearest names)."""
    name = config.distillation.teacher_model
    if config.distillation.teacher == "model" and name and not timm.is_model(name.partition(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        remedy = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them all"
        raise ConfigError(f"distillation.teacher_model = {name!r}: timm has no such model; {remedy}")


def check_training(config: Config, batch: BatchSizes, index: DatasetIndex, network: AdaptiveNetwork) -> None:
    """Build and drop what each phase is made of, whose faults would show only after the ranks have met.

    That is augmentation, mixing, phases, optimizer and schedule; each raises ConfigError.
    """
    check_deepspeed_section(config, batch)
    check_teacher(config)
    train_transform(config.data)
    Mixer(config.data, network.num_classes, batch.micro_batch)
    steps = steps_per_epoch(index.split(config.data.train_split).count, batch.global_batch)
    for phase in config.resolved_phases():
        plan = plan_phase(config, phase, len(network.exits))
        optimizer = build_optimizer(network, config.optimizer, plan.lr)
        build_scheduler(optimizer, config.schedule, plan.lr, plan.epochs, steps)


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
            demand = "train.resume = 'must', but there is " if resume == "must" else ""
            raise CheckpointError(
                f"{demand}no valid checkpoint to continue from in {store.folder} ({found}); restore one, "
                f"or start afresh with {'train.resume=auto' if not existing else 'another train.run_folder'}"
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
