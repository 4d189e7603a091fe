"""Checks before anything starts: what would fail later fails here, with the key and the remedy."""

from __future__ import annotations

import logging
import os
import platform
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import get_args

import timm

from adaptive.config import saved
from adaptive.config.checks import check_exit_weights as check_exit_weights  # the run finds all its checks here
from adaptive.config.loading import differences, parse_config
from adaptive.config.sections import Config
from adaptive.data.images.crop_flip import DrawnBy
from adaptive.data.images.transforms import Mixer, train_transform
from adaptive.data.reading.order import steps_per_epoch
from adaptive.data.remote.urls import is_remote
from adaptive.data.shards.cache import check_cache
from adaptive.data.shards.index import DatasetIndex, check_shards, check_split, load_index
from adaptive.errors import CheckpointError, ConfigError, DataError, MachineError, SilentHolderError
from adaptive.files import link_out_of, tidy_asides
from adaptive.foreign_text import shell_words, shown_location, visible, without_secrets
from adaptive.locks import Lock, LockHeldError
from adaptive.networks.backbone import other_model
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.batch import BatchSizes
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore
from adaptive.training.checks.idle import check_methods_act, idle_notes
from adaptive.training.checks.optimizer import check_optimizer_acts, optimizer_notes
from adaptive.training.checks.schedule import check_schedule
from adaptive.training.checks.trial import check_phases_learn
from adaptive.training.engine.passed_through import check_deepspeed_section
from adaptive.training.losses.model_teacher import check_teacher_classes
from adaptive.training.optimizer import check_optimizer
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
    "train.accept_new_data",
    "train.startup_timeout",
    "train.step_timeout",
    "train.save_timeout",
    "train.peer_timeout",
    "data.path",
    "data.workers",
    "data.cache",
    "data.cache_gib",
    "data.cache_ahead",
    "data.attempts",
    "data.timeout",
    "data.pipe",
    "data.in_memory",
    "data.max_bad",
    "evaluate.batch",
}
FREE_SECTIONS = ("tracking.", "checkpoint.", "deepspeed.")
LOGGER = logging.getLogger(__name__)
MIB = 2**20
PATIENCE = 120.0  # seconds; file servers take up to 90 to notice that a machine has gone


def check_dataset(config: Config, rank: int = 0, local_rank: int = 0) -> DatasetIndex:
    """Load the index and check splits, shards and class count (raises DataError or ConfigError).

    A folder's shards are looked for by the first rank of each node, a URL's by rank 0 alone: all ranks together would
    ask the file system for every shard once per rank. A rank that finds a fault tells the others.
    """
    data = config.data
    remote = is_remote(data.path)
    try:
        index = load_index(data.path, data)
        for key in ("train_split", "val_split"):
            split = getattr(data, key)
            check_split(index, f"data.{key}", split)
            if remote:
                check_cache(index, split, data)
            if (rank if remote else local_rank) == 0:
                check_shards(index, data.path, split, settings=data, quiet=rank != 0)
    except DataError as error:
        raise DataError(f"data.path = {shown_location(data.path)!r}: {error}") from None
    steps_per_epoch(index.split(data.train_split).count, config.train.global_batch)
    if len(index.classes) < 2:
        raise DataError(
            f"data.path = {shown_location(data.path)!r} has {len(index.classes)} class, of which every answer is "
            "right; pack images of two classes or more"
        )
    wanted = config.model.num_classes
    if wanted is not None and wanted != len(index.classes):
        raise ConfigError(
            f"model.num_classes = {wanted}, but the dataset {shown_location(data.path)} has {len(index.classes)} "
            "classes; remove model.num_classes to take the dataset's"
        )
    return index


def check_run_folder(folder: Path) -> None:
    """Make sure the run folder can be written (raises MachineError)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise MachineError(
            f"train.run_folder = {str(folder)!r} cannot be written: {error.strerror}; choose another folder"
        ) from None


def check_links(folder: Path) -> None:
    """Refuse a run folder with a link to elsewhere in it, through which the run would write there (MachineError)."""
    link = link_out_of(folder) if folder.is_dir() else None
    if link is not None:
        raise MachineError(
            f"train.run_folder = {str(folder)!r}: {link} is a link to {link.resolve()}, and a run writes nothing "
            f"outside of its folder; remove it (rm {shell_words(link)}), or let the run folder itself be the link"
        )


def occupy(folder: Path, patience: float = PATIENCE, lost: Callable[[str], None] | None = None) -> Lock:
    """Take the run folder for this process until the lock is released or the process ends, however it ends.

    Waits ``patience`` seconds: the lock of a machine that has died stands until the file server gives it up.

    Args:
        folder: of the run.
        patience: seconds.
        lost: see `adaptive.locks.Lock`.

    Raises:
        MachineError: another process trains in it, or the lock's file cannot be written.
        SilentHolderError: the lock is another machine's that gives no sign of life, and cannot be taken over.
    """
    owner = folder / ".owner"
    lock = Lock(folder / ".lock", lost)
    where = f"train.run_folder = {str(folder)!r}"

    def who(holder: str) -> str:
        with suppress(OSError):
            return holder or visible(owner.read_text(encoding="utf-8", errors="replace"))[:200]
        return "another process"

    def tell(holder: str) -> None:
        LOGGER.warning("%s is in use by %s; waiting up to %g s for it to end", folder, who(holder), patience)

    try:
        lock.acquire(patience, tell)
    except LockHeldError as held:
        if held.silent:
            raise SilentHolderError(
                f"{where} is locked by {who(held.holder)}, which gives no sign of life; if it has gone, remove its "
                f"lock: rm {shell_words(held.file)}"
            ) from None
        raise MachineError(
            f"{where} is in use: {who(held.holder)} trains in it; end that run (its ranks outlive a killed deepspeed "
            "command), or choose another folder"
        ) from None
    except OSError as error:
        raise MachineError(
            f"{where} cannot be locked: {error.filename or lock.path}: {error.strerror}; a run is continued by whoever "
            "began it, or by users of a group that may write there (umask 002)"
        ) from None
    tidy_asides(folder)
    with suppress(OSError):  # a full disk is told of later
        owner.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    return lock


def checkpoint_bytes(network: AdaptiveNetwork, config: Config) -> int:
    """Return the bytes of one checkpoint at most: weights, two optimizer states and an average.

    ``checkpoint.keep`` of them stay, the best, and one more while it is written.
    """
    return sum(p.numel() for p in network.parameters()) * 4 * (3 + bool(config.train.ema_decay))


def check_disk_space(folder: Path, network: AdaptiveNetwork, config: Config) -> None:
    """Refuse a run whose checkpoints cannot fit; see ``checkpoint_bytes``. The folder need not exist yet."""
    needed = checkpoint_bytes(network, config) * (config.checkpoint.keep + 2)
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    # A run that is continued has checkpoints already, which the coming ones replace.
    own = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*") if path.is_file())
    if free + own < needed:
        raise MachineError(
            f"train.run_folder = {str(folder)!r} has {free // MIB} MiB free, the checkpoints of this run need about "
            f"{(needed - own) // MIB} MiB; free space, choose another folder, or lower checkpoint.keep"
        )


def check_teacher(config: Config, num_classes: int) -> None:
    """Refuse a teacher that timm does not know, or of other classes (raises ConfigError)."""
    name = config.distillation.teacher_model
    if config.distillation.teacher == "model" and name and not timm.is_model(name.partition(".")[0]):
        raise ConfigError(f"distillation.teacher_model = {name!r}: timm has no such model; {other_model(name)}")
    for key in ("num_classes", "pretrained", "model_name", "checkpoint_path"):
        if key in config.distillation.teacher_options:
            raise ConfigError(
                f"distillation.teacher_options = {config.distillation.teacher_options}: {key} is set by the dataset, "
                "distillation.teacher_model and distillation.teacher_weights; remove it"
            )
    teaches = config.distillation.gamma and any(phase.distillation for phase in config.resolved_phases())
    if config.distillation.teacher == "model" and teaches:
        check_teacher_classes(config.distillation, num_classes)


def check_training(
    config: Config,
    batch: BatchSizes,
    index: DatasetIndex,
    network: AdaptiveNetwork,
    device: str | None = None,
    begun: bool = False,
) -> list[str]:
    """Build and drop what each phase is made of, whose faults would show only after the ranks have met.

    That is augmentation, mixing, phases, losses, optimizer, schedule and DeepSpeed's settings. What would change
    nothing is refused (each raises ConfigError), or told: returns notes for the user, a line each.

    Args:
        config: the run's.
        batch: its batch sizes, for the number of ranks.
        index: its dataset.
        network: built on the CPU; it is left as it is.
        device: type of the device that trains, None where it is not known yet.
        begun: whether the run folder holds a run: what it was begun with cannot change any more, and is told.
    """
    check_optimizer(config.optimizer, config.train.zero_stage)
    check_deepspeed_section(config, batch, device)
    check_teacher(config, network.num_classes)
    train_transform(config.data)
    Mixer(config.data, network.num_classes, batch.micro_batch)
    steps = steps_per_epoch(index.split(config.data.train_split).count, batch.global_batch)
    plans = [plan_phase(config, phase, len(network.exits)) for phase in config.resolved_phases()]
    return [
        *_refused_or_told(begun, check_methods_act, config, len(network.exits), plans),
        *_refused_or_told(begun, check_optimizer_acts, config, network, plans),
        *_refused_or_told(begun, check_schedule, config, plans, steps),
        *optimizer_notes(config.optimizer),
        *check_phases_learn(config, batch, network, plans),
        *idle_notes(config, batch, network, plans, steps, device),
    ]


def _refused_or_told(begun: bool, check: Callable[..., list[str] | None], *arguments: object) -> list[str]:
    """Return a check's notes; of a run that has begun, its refusal is one too."""
    try:
        return check(*arguments) or []
    except ConfigError as refusal:
        if not begun:
            raise
        return [str(refusal)]


def find_resume_point(config: Config, index: DatasetIndex, store: CheckpointStore) -> tuple[Checkpoint | None, list]:
    """Decide from where the run starts; returns (checkpoint or None, reasons why newer ones were passed over).

    Raises:
        CheckpointError: train.resume forbids or demands a continuation that is there or not, or the run folder belongs
            to another configuration or dataset, or its run draws in a way that data.in_memory does not.
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
    if fingerprint != index.fingerprint and not config.train.accept_new_data:
        raise CheckpointError(
            f"data.path = {shown_location(config.data.path)!r} is not the dataset this run began with (fingerprint "
            f"{index.fingerprint[:12]}, then {fingerprint[:12]}); use that dataset, another train.run_folder, or "
            "train.accept_new_data=true"
        )
    if config.data.in_memory and recorded_draws(checkpoint) == "sample":
        raise CheckpointError(
            f"data.in_memory = true: the run in {folder} was begun by a version that drew crop and flip image by "
            "image, which memory does not; continue it with data.in_memory=false, or use another train.run_folder"
        )
    return checkpoint, passed_over


def recorded_draws(checkpoint: Checkpoint | None) -> DrawnBy:
    """Return how the run to be continued draws crop and flip; without a record as earlier versions did."""
    if checkpoint is None:
        return "epoch"
    found = checkpoint.state().get("drawn_by", "sample")
    if found not in get_args(DrawnBy):
        raise CheckpointError(
            f"{checkpoint.path} draws crop and flip by {found!r}, which this version does not know; continue the run "
            "with the version that began it"
        )
    return found


def write_config(config: Config, folder: Path) -> None:
    """Keep the resolved configuration with the run, its secrets in a file that its owner alone reads."""
    saved.write_config(config, folder / "config.yaml")


def _check_same_run(config: Config, folder: Path) -> None:
    file = folder / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{folder} has checkpoints but no config.yaml; restore it, or use another folder")
    # Somebody else who goes on with the run has the values, but not the private file that says them.
    begun, wanted = (parse_config(without_secrets(c.model_dump())) for c in (saved.read_saved(file), config))
    changed = {
        key: values
        for key, values in differences(begun, wanted).items()
        if key not in FREE_ON_RESUME and not key.startswith(FREE_SECTIONS)
    }
    if changed:
        key, (then, now) = next(iter(changed.items()))
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{folder} holds a run with {key} = {then!r}, now it is {now!r}{more}; "
            "keep the value to continue that run, or choose another train.run_folder, which can begin from that run's "
            f"network with {shell_words(f'model.from_run={folder}')}"
        )
