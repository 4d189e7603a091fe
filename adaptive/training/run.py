"""A whole run, from a configuration to a trained run folder: check, build, train."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adaptive.config.sections import Config
from adaptive.data.reading.in_memory import check_memory
from adaptive.distributed.launchers import started_by_mpirun
from adaptive.distributed.ranks import Ranks
from adaptive.distributed.same_start import check_same_start
from adaptive.errors import EXIT_HUNG, AdaptiveError, ConfigError
from adaptive.files import installed_version
from adaptive.foreign_text import say
from adaptive.networks.weights import initial_weights
from adaptive.tracking.console import Console
from adaptive.tracking.dashboard import open_dashboard
from adaptive.tracking.record import Record
from adaptive.training import preflight
from adaptive.training.batch import batch_sizes
from adaptive.training.callbacks.checkpointing import Checkpointing
from adaptive.training.callbacks.observers import ConsoleObserver, DashboardObserver, RecordObserver
from adaptive.training.callbacks.rank_times import RankTimes
from adaptive.training.callbacks.sample_log import SampleLog
from adaptive.training.callbacks.system import SystemRecords
from adaptive.training.callbacks.training_records import TrainingRecords
from adaptive.training.callbacks.validation import Validation
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore
from adaptive.training.engine.group import from_first_rank, init_distributed, resolve_device
from adaptive.training.engine.operators import check_operator_folder
from adaptive.training.learner import collective_timeout, warn_about_scale_invariance
from adaptive.training.prepared_run import Prepared
from adaptive.training.starting import settings
from adaptive.training.starting.first_network import first_network, other_classes
from adaptive.training.starting.frozen import check_frozen
from adaptive.training.streams import Streams
from adaptive.training.supervision.causes import explained
from adaptive.training.supervision.machine_load import MachineLoad
from adaptive.training.supervision.peers import Peers, host_name
from adaptive.training.supervision.signals import StopSignals
from adaptive.training.supervision.start_clock import StartClock
from adaptive.training.supervision.start_facts import check_same_checkpoint, start_facts
from adaptive.training.supervision.supervisor import Supervisor
from adaptive.training.supervision.watchdog import Watchdog
from adaptive.training.trainer import Callback, Trainer

VERSIONS_OF = ("torch", "deepspeed", "timm", "webdataset", "wandb")


def supervise(config: Config, ranks: Ranks) -> Supervisor:
    """Begin to listen for signals and to watch for hangs; call first of all, in the main thread."""
    train = config.train
    limits = {"startup": train.startup_timeout, "step": train.step_timeout, "save": train.save_timeout}
    watchdog = Watchdog(Path(str(train.run_folder)), ranks.rank, limits).start("startup")
    clock = StartClock(process=True)
    clock.done("imports")
    return Supervisor(StopSignals().listen(), watchdog, config.data.max_bad, clock)


def prepare(config: Config, ranks: Ranks, clock: StartClock | None = None) -> Prepared:
    """Check the configuration against machine, dataset and backbone, and build the network on the CPU.

    ``clock`` times what takes long.

    Raises:
        AdaptiveError: one of its kinds, naming key, value and remedy. Nothing has been written but the run folder.
    """
    clock = clock or StartClock()
    if ranks.rank:  # what is told of weights and settings is the same on every rank
        for quiet in (initial_weights.log, settings.LOGGER):
            quiet.setLevel(logging.ERROR)
    config = settings.complete(config)
    device = resolve_device(config.train.device, ranks.local_rank if ranks.device is None else ranks.device)
    if config.model.sync_batchnorm and device.type != "cuda":
        raise ConfigError("model.sync_batchnorm = true needs a GPU, and this machine has none; set it to false")
    batch = batch_sizes(config, ranks.world)
    index = preflight.check_dataset(config, ranks.rank, ranks.local_rank)
    if config.data.in_memory:
        check_memory(index, config.data)
    clock.done("dataset")
    folder = Path(str(config.train.run_folder))
    if ranks.local_rank == 0:  # what these ask a file system is the same for all ranks of a node
        preflight.check_run_folder(folder)
        preflight.check_links(folder)
        if device.type == "cpu":
            check_operator_folder()
    goes_on = bool(CheckpointStore(folder / "checkpoints").all())
    network, source, told = first_network(config, index.classes, goes_on)
    clock.done("network")
    preflight.check_exit_weights(config, len(network.exits))
    if ranks.local_rank == 0:
        preflight.check_disk_space(folder, network, config)
    notes = preflight.check_training(config, batch, index, network, device.type, goes_on)
    begins_from, begun = source.provenance() if source else None, [told] if told else []
    prepared = Prepared(config, batch, device, ranks, folder, index, network, begins_from, (*begun, *notes))
    if not goes_on:
        _check_beginning(prepared)
    clock.done("checks")
    return prepared


def _check_beginning(prepared: Prepared) -> None:
    """Refuse what would begin with random values and keep them, or would teach with them (raises ConfigError)."""
    check_frozen(prepared.config, prepared.network, prepared.plans)
    distillation = prepared.config.distillation
    if distillation.teacher == "model" and any(plan.gamma for plan in prepared.plans):
        weights = distillation.teacher_weights
        if weights and (other := other_classes(weights, prepared.index.classes)):
            raise ConfigError(
                f"distillation.teacher_weights = {weights!r}: {other}; give one trained on this dataset's"
            )
        prepared.model_teacher(prepared.network.num_classes)


def train(prepared: Prepared, supervisor: Supervisor | None = None, origin: Mapping[str, Any] | None = None) -> Path:
    """Join the other ranks, train from wherever the run folder stands, and return that folder.

    ``origin`` is what the launcher knows of this start; it is recorded with the environment.

    Raises:
        StoppedError: a signal asked the run to stop, and it has saved.
        MachineError: memory ran out, another rank ended, or another process trains in the run folder.
        StartError: a rank was started with another configuration, dataset, code, library, device or run folder.
    """
    supervisor = supervisor or Supervisor(max_bad=prepared.config.data.max_bad)
    try:
        with ExitStack() as held:
            return _train(prepared, supervisor, held, origin or {})
    except (RuntimeError, MemoryError) as error:
        known = explained(error, prepared, supervisor.account)
        if known is None:
            raise
        raise known from error


def _train(prepared: Prepared, supervisor: Supervisor, held: ExitStack, origin: Mapping[str, Any]) -> Path:
    config, ranks, folder = prepared.config, prepared.ranks, prepared.folder

    def meet(store: dist.Store) -> None:
        check_same_start(store, ranks.rank, ranks.world, host_name(), start_facts(prepared))

    init_distributed(collective_timeout(config), meet)
    supervisor.clock.done("meeting")
    machine = MachineLoad(prepared.device, whole=ranks.local_rank == 0)
    if ranks.world > 1:
        limit, own = config.train.peer_timeout, supervisor.own_times
        peers = Peers(ranks.rank, ranks.world, limit, supervisor.progress, machine.sample, own=own)
        supervisor.watch_peers(peers)
    store = CheckpointStore(folder / "checkpoints")

    def resume_point() -> tuple[Checkpoint | None, list[str]]:
        held.callback(preflight.occupy(folder, lost=_leave_to_others).release)
        return preflight.find_resume_point(config, prepared.index, store)

    checkpoint, passed_over = _decided_by_first_rank(ranks, resume_point)
    check_same_checkpoint(prepared, store, checkpoint)
    supervisor.clock.done("checkpoint")
    streams = Streams.open(prepared, checkpoint)
    supervisor.clock.done("data")
    callbacks: list[Callback] = []
    if ranks.rank == 0:
        preflight.write_config(config, folder)
        # Observers first: the record cuts back what an interrupted run wrote before anybody publishes.
        callbacks += _observers(prepared, origin)
    callbacks += [
        TrainingRecords(config.tracking.every_steps, config.tracking.gradient_norms),
        Validation(config.evaluate),
        Checkpointing(config.checkpoint),
    ]
    if config.tracking.system_seconds and ranks.rank == 0:
        callbacks.append(SystemRecords(config.tracking.system_seconds, machine))
    if ranks.world > 1 and ranks.rank == 0:
        callbacks.append(RankTimes(ranks.world, config.tracking.system_seconds))
    if config.tracking.sample_ids:
        callbacks.append(SampleLog(folder, ranks.rank, ranks.world))
    trainer = Trainer(prepared, streams, store, callbacks, supervisor)
    if ranks.rank == 0:
        for line in _introduction(prepared, checkpoint, passed_over):
            trainer.message(line)
    trainer.run(checkpoint)
    return folder


def _leave_to_others(reason: str) -> None:
    """End the process at once: another start may train in the run folder by now, and two must not write there."""
    say(
        f"adaptive train: error: the run folder's lock {reason}: this process stood still for too long, or the file "
        "server did not answer; it ends without saving, and the same command continues from the newest checkpoint",
        file=sys.stderr,
    )
    os._exit(EXIT_HUNG)


def _observers(prepared: Prepared, origin: Mapping[str, Any]) -> list[Callback]:
    config, folder, index = prepared.config, prepared.folder, prepared.index
    watched = not started_by_mpirun(os.environ)
    console = Console(prepared.total_steps, enabled=True, epochs=prepared.total_epochs, watched=watched)
    environment = {
        **origin,
        "versions": {name: installed_version(name) for name in VERSIONS_OF} | {"python": platform.python_version()},
        "cuda": torch.version.cuda if prepared.device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(prepared.device) if prepared.device.type == "cuda" else "cpu",
        "world": prepared.ranks.world,
        "ranks_here": prepared.ranks.local_world,
        "batch": {name: getattr(prepared.batch, name) for name in ("global_batch", "micro_batch", "accumulation")},
    }
    if prepared.begins_from:
        environment["begins_from"] = prepared.begins_from
    with suppress(OSError), (folder / "environment.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(environment) + "\n")
    notes = {
        **environment,
        "dataset": {
            "fingerprint": index.fingerprint,
            "path": config.data.path,
            "images": {name: split.count for name, split in index.splits.items()},
            "classes": len(index.classes),
        },
        "exits": prepared.network.exit_names,
        "macs": [cost.macs for cost in prepared.costs],
    }
    dashboard = open_dashboard(config.tracking, folder, config.model_dump(), notes)
    # The record comes first: it is the log, the others are windows on it.
    record = Record(folder / "metrics.jsonl")
    return [RecordObserver(record), ConsoleObserver(console), DashboardObserver(dashboard, record)]


def _introduction(prepared: Prepared, checkpoint: Checkpoint | None, passed_over: Sequence[str]) -> Iterator[str]:
    """Yield the lines that a run begins with; ``passed_over`` says why checkpoints newer than this one are unused."""
    config, batch = prepared.config, prepared.batch
    start = checkpoint.step if checkpoint else 0
    for reason in passed_over:
        yield f"passed over a damaged checkpoint: {reason}"
    names = [*prepared.network.exit_names, "the backbone's end"]
    exits = ", ".join(f"{name} ({cost.macs / 1e6:,.1f} M)" for name, cost in zip(names, prepared.costs, strict=True))
    yield f"{config.model.backbone}, exits after (multiply-adds): {exits}"
    yield (
        f"{prepared.device.type}, {batch.world} rank(s) x {batch.micro_batch} images x {batch.accumulation} "
        f"accumulated = {batch.global_batch} per step, {prepared.total_steps} steps, "
        f"{config.train.precision}, ZeRO {config.train.zero_stage}"
    )
    if batch.derived:
        yield batch.derived
    if checkpoint and start >= prepared.total_steps and checkpoint.state().get("closed", True):
        yield f"{prepared.folder} is finished: all {start} steps are done"
    elif start:
        yield f"continuing {prepared.folder} from step {start}"
    if warning := warn_about_scale_invariance(config):
        yield f"note: {warning}"
    for note in prepared.notes:
        yield f"note: {note}"


def _decided_by_first_rank(ranks: Ranks, decide: Callable[[], Any]) -> Any:
    """Let rank 0 look at the disk and tell the others, so that all start from the same checkpoint or fail alike."""
    outcome: Any = None
    if ranks.rank == 0:
        try:
            outcome = decide()
        except AdaptiveError as error:
            outcome = error
    outcome = from_first_rank(outcome)
    if isinstance(outcome, AdaptiveError):
        raise outcome
    return outcome


def limit_threads() -> None:
    """Without a setting of the user's, keep several ranks on one machine from fighting for its cores."""
    if "OMP_NUM_THREADS" not in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
