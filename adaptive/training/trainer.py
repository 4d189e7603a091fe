"""A run: phases one after another, each with an engine of its own, and the thin loop over steps inside."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive.config.sections import Config
from adaptive.data.reading.stream import Batch, EvaluationStream, LoaderOptions, TrainStream
from adaptive.data.shards.index import DatasetIndex
from adaptive.errors import StoppedError, TrainingError
from adaptive.metrics import ExitMeter, Measurement, measure_exits
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast
from adaptive.training.active_phase import ActivePhase
from adaptive.training.batch import BatchSizes
from adaptive.training.checkpoints.saver import Saver
from adaptive.training.checkpoints.snapshot import capture, restore, whole_weights, with_averaged_statistics
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore
from adaptive.training.engine.group import all_reduce
from adaptive.training.learner import build_learner, build_task
from adaptive.training.optimizer import build_scheduler
from adaptive.training.phases import plan_phase, set_modes
from adaptive.training.progress import Progress
from adaptive.training.spikes import SpikeGuard
from adaptive.training.supervision.supervisor import StopAskedError, Supervisor

Values = Mapping[str, Any]


class Callback:
    """Base of what observes a run: one method per moment at which it may act.

    On several ranks every rank calls every method, at the same steps.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Act before the first step; the position of a resumed run is known."""

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Act on every micro batch of this rank before it is trained on."""

    def on_gradients(self, trainer: Trainer) -> None:
        """Act when the gradients of a step are complete, before the update."""

    def on_step(self, trainer: Trainer) -> None:
        """Act after every step."""

    def on_epoch_end(self, trainer: Trainer) -> None:
        """Act after the last step of an epoch, and once more at the end of a run cut short inside one."""

    def on_stop(self, trainer: Trainer) -> None:
        """Act between two steps, or in a validation, when the run was asked to stop: it ends after this."""

    def on_values(self, trainer: Trainer, values: Values) -> None:
        """Take published values: record keys such as ``train/exit_1/top1``."""

    def on_message(self, trainer: Trainer, text: str) -> None:
        """Take a line for the reader."""

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Act when the run ends, by itself or by an error."""


class Trainer:
    """Trains a network through all phases of a configuration, from wherever the run stands.

    ``network`` is a template on the CPU: every phase trains a copy of it, so that an engine never meets a network that
    another engine has partitioned.
    """

    def __init__(
        self,
        config: Config,
        index: DatasetIndex,
        network: AdaptiveNetwork,
        batch: BatchSizes,
        device: torch.device,
        rank: int,
        store: CheckpointStore,
        callbacks: Sequence[Callback],
        supervisor: Supervisor | None = None,
    ):
        self.config, self.index, self.template, self.batch = config, index, network, batch
        self.device, self.rank, self.store, self.callbacks = device, rank, store, list(callbacks)
        self.supervisor = supervisor or Supervisor()
        self.exits = len(network.exits)
        self.costs = network.costs()
        self.plans = [plan_phase(config, phase, self.exits) for phase in config.resolved_phases()]
        self.saver = Saver(store, config.checkpoint, self._warn_about_saving)
        self.progress = Progress()
        self.resumed = False
        self.unclosed = False  # whether the end of the epoch that the last step ended is still to be carried out
        self.score: float | None = None
        self.data_seconds = 0.0
        self.step_ended = time.perf_counter()
        self.all_reduce: Callable[[Tensor], Tensor] = all_reduce
        self._active: ActivePhase | None = None
        data, train = config.data, config.train
        layout = torch.channels_last if train.channels_last else torch.contiguous_format
        loader = LoaderOptions(rank, batch.world, data.workers, device, layout)
        self.stream = TrainStream(
            index, data, data.train_split, loader,
            seed=train.seed, global_batch=batch.global_batch, micro_batch=batch.micro_batch,
        )  # fmt: skip
        self.validation_stream = EvaluationStream(index, data, data.val_split, loader, batch=config.evaluate.batch)

    @property
    def active(self) -> ActivePhase:
        """The phase in training."""
        assert self._active is not None, "no phase has started"
        return self._active

    @property
    def started(self) -> bool:
        """Whether a phase has started."""
        return self._active is not None

    @property
    def total_steps(self) -> int:
        """Steps of the whole run, or train.max_steps where that is less."""
        full = sum(plan.epochs for plan in self.plans) * self.stream.steps_per_epoch
        return min(full, self.config.train.max_steps or full)

    @property
    def total_epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(plan.epochs for plan in self.plans)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the last step belonged to, from 1."""
        return max(self.progress.step - 1, 0) // self.stream.steps_per_epoch + 1

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step ended an epoch or the run."""
        return self.progress.step % self.stream.steps_per_epoch == 0 or self.at_end

    @property
    def at_end(self) -> bool:
        """Whether no step is left."""
        return self.progress.step >= self.total_steps

    def run(self, checkpoint: Checkpoint | None = None) -> None:
        """Train to the end, from ``checkpoint`` where one is given.

        Raises:
            StoppedError: a rank was asked to stop; a checkpoint of the last step is written.
            TrainingError: too many steps in a row had a gradient that is not finite.
            DataError: a sample cannot be read.
        """
        error: BaseException | None = None
        try:
            state = self._load(checkpoint)
            self.supervisor.meet()
            self._notify("on_start")
            while self.progress.phase < len(self.plans) and (not self.at_end or self.unclosed):
                self.supervisor.alive("startup")
                self._start_phase(checkpoint, state)
                state = None
                if self.unclosed:
                    self._close_epoch()
                for _ in self._steps():
                    self._notify("on_step")
                    # At the end there is nothing left to stop but the last validation.
                    if self.supervisor.stop_asked() and not self.at_end:
                        self._stop()
                    if self.at_epoch_end:
                        self._close_epoch()
                self._end_phase()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.saver.close()
            for callback in self.callbacks:
                callback.on_end(self, error)

    def publish(self, values: Mapping[str, Any]) -> None:
        """Hand values to every observer, with the position they belong to."""
        position = {"step": self.progress.step, "epoch": self.epoch, "samples": self.progress.samples}
        plan = self.plans[min(self.progress.phase, len(self.plans) - 1)]
        complete = {**position, "phase": plan.name, **values}
        for callback in self.callbacks:
            callback.on_values(self, complete)

    def message(self, text: str) -> None:
        """Show the reader a line."""
        for callback in self.callbacks:
            callback.on_message(self, text)

    def validate(self) -> dict[str, Measurement]:
        """Measure the validation split with the network in training, and with its moving average (collective)."""
        active = self.active
        measured = {}
        active.network.eval()
        with with_averaged_statistics(active.network):
            measured["val"] = self._measure(active.engine)
        set_modes(active.network, active.plan)
        if active.learner.average is not None:
            average = active.learner.average.network

            def forward(images: Tensor) -> list[Tensor]:
                with autocast(self.config.train.precision, self.device):
                    return average(images)

            with with_averaged_statistics(average):
                measured["val_ema"] = self._measure(forward)
        return measured

    def save(self, closed: bool = True) -> None:
        """Take a snapshot of this moment; rank 0 writes it, by default while training goes on (collective).

        Args:
            closed: whether the end of the epoch that falls on this step, if one does, has been carried out.

        Raises:
            MachineError: rank 0 could not write the last ``checkpoint.max_failed`` ones; only it knows.
        """
        self.supervisor.alive("save")
        self.saver.wait()  # before the next snapshot takes memory
        tensors, state = capture(self.active.learner, keep=self.rank == 0)
        state |= {
            "progress": {**self.progress.as_dict(), "finished": self.at_end},
            "exits": self.template.exit_names,
            "collaboration": self.active.plan.collaboration,
            "classes": self.index.classes,
            "dataset": self.index.fingerprint,
            "world": self.batch.world,
            "closed": closed,
        }
        if self.active.spikes is not None:
            state["spikes"] = self.active.spikes.state()
        if self.rank == 0:
            self.saver.save(self.progress.step, tensors, state, self.score, self.progress.phase, self.epoch)
        self.supervisor.alive("step")

    def finish_saving(self) -> None:
        """Wait until the run's last save is on disk (collective; raises MachineError on all ranks if it is not)."""
        self.supervisor.alive("save")
        self.saver.finish()

    def _warn_about_saving(self, text: str, failed: int) -> None:
        self.message(f"warning: {text}")
        if failed:
            self.publish({"checkpoint/failed": failed})

    def _measure(self, forward: Callable[[Tensor], list[Tensor]]) -> Measurement:
        stream = self.validation_stream
        batches = self.supervisor.watched(stream)
        return measure_exits(
            forward, batches, self.exits, self.device, stream.total, all_reduce, self.config.train.channels_last
        )

    def _notify(self, moment: str) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self)

    def _close_epoch(self) -> None:
        """Validate, save what is due; a run that is stopped in here does so when it goes on."""
        try:
            self._notify("on_epoch_end")
        except StopAskedError:
            self._stop()
        self.unclosed = False

    def _stop(self) -> None:
        """Save and leave, all ranks together."""
        self.supervisor.alive("save")
        self._notify("on_stop")
        signals = self.supervisor.signals
        reason = signals.received.name if signals and signals.received else "another rank"
        raise StoppedError(
            f"stopped by {reason} after step {self.progress.step} of {self.total_steps}, saved in {self.store.folder}; "
            "the same command continues the run"
        )

    def _load(self, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
        if checkpoint is None:
            return None
        state = checkpoint.state()
        self.progress = Progress(**state["progress"])
        self.template.load_state_dict(checkpoint.tensors("weights"))
        self.resumed = True
        self.unclosed = not state.get("closed", True)
        if not self.unclosed and self.progress.phase_step >= self._phase_steps(self.progress.phase):
            self.progress.next_phase()  # it was saved as its phase ended: the next one starts from these weights
            return None
        return state

    def _phase_steps(self, phase: int) -> int:
        return self.plans[phase].epochs * self.stream.steps_per_epoch

    def _start_phase(self, checkpoint: Checkpoint | None, state: dict[str, Any] | None) -> None:
        """Build the phase's engine; with ``state`` continue inside the phase, else begin it."""
        progress, config = self.progress, self.config
        plan = self.plans[progress.phase]
        files = ("optimizer", "ema", "teacher", "statistics")
        tensors = {name: checkpoint.tensors(name) for name in files} if checkpoint and state else {}
        network = copy.deepcopy(self.template)
        learner, teacher = build_learner(
            config, plan, network, self.batch, self.device, tensors.get("teacher"),
            reset_seed=None if state else config.train.seed + progress.phase,
        )  # fmt: skip
        scheduler = build_scheduler(
            learner.engine.optimizer, config.schedule, plan.lr, plan.epochs, self.stream.steps_per_epoch
        )
        if state:
            restore(learner, tensors, state)
        scheduler.step_update(progress.phase_applied)
        meter = ExitMeter(self.exits, self.device)
        first_step = progress.step - progress.phase_step
        weights = plan.weights_from(first_step, self.stream.steps_per_epoch, config.train.seed)
        task = build_task(config, plan, learner.engine, teacher, meter, self.batch, len(self.index.classes), weights)
        last_step = min(self.total_steps, first_step + self._phase_steps(progress.phase))
        spikes = SpikeGuard(config.train.spike_sigma) if config.train.spike_sigma else None
        if spikes and state and "spikes" in state:
            spikes.load_state(state["spikes"])
        self._active = ActivePhase(plan, learner, scheduler, task, last_step, spikes)
        set_modes(network, plan)

    def _end_phase(self) -> None:
        """Carry the learned weights over to the template, for the next phase or for whoever asks."""
        self.template.load_state_dict(whole_weights(self.active.engine, self.active.network))
        self.active.engine.destroy()
        if self.progress.phase_step >= self._phase_steps(self.progress.phase):
            self.progress.next_phase()
        self._active = None

    def _steps(self) -> Iterator[None]:
        """Run the phase's remaining steps, yielding after each."""
        active, progress = self.active, self.progress
        batches = self.stream.batches(progress.step, active.last_step)
        try:
            while progress.step < active.last_step:
                applied = self._step(batches)
                self.supervisor.alive("step")
                self.supervisor.first_step_done()
                progress.advance(applied, self.batch.global_batch)
                if applied:
                    self._follow_applied_step()
                self.step_ended = time.perf_counter()
                if progress.skipped_in_row >= self.config.train.max_skipped:
                    raise TrainingError(self._divergence())
                yield
        finally:
            batches.close()  # type: ignore[attr-defined]

    def _step(self, batches: Iterator[Batch]) -> bool:
        active = self.active
        applied, losses = False, torch.zeros((), device=self.device)
        for micro in range(self.batch.accumulation):
            waiting = time.perf_counter()
            batch = next(batches)
            self.data_seconds += time.perf_counter() - waiting
            for callback in self.callbacks:
                callback.on_batch(self, batch)
            labels = batch.labels.to(self.device, non_blocking=True)
            loss = active.task.loss(batch.images, labels, (self.progress.step, self.rank, micro))
            last = micro == self.batch.accumulation - 1
            if active.spikes:
                losses += loss.detach() / (self.batch.accumulation * self.batch.world)
                if last and active.spikes.is_spike(self.all_reduce(losses).item()):
                    loss = loss * float("nan")  # a gradient that is not finite is skipped alike at every ZeRO stage
            active.engine.backward(loss)
            if last:
                self._notify("on_gradients")
            applied = active.engine.step()
        return applied

    def _follow_applied_step(self) -> None:
        """Move what follows applied steps only: the learning rate and the moving average."""
        active = self.active
        active.scheduler.step_update(self.progress.phase_applied)
        average = active.learner.average
        if average is not None:
            parameters = list(active.network.parameters())
            with active.engine.gathered(parameters):
                average.update(parameters, active.network.buffers())

    def _divergence(self) -> str:
        self.saver.close()
        last, _ = self.store.newest_valid()
        remedy = f"the last good checkpoint is {last.path}" if last else "no checkpoint had been written yet"
        return (
            f"{self.progress.skipped_in_row} steps in a row had a gradient that is not finite, up to step "
            f"{self.progress.step}; {remedy}. Lower optimizer.lr, set train.clip_norm, or use train.precision=fp32"
        )
