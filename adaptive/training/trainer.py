"""The training loop: phases one after another, each with an engine of its own, and the steps inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from adaptive.data.reading.stream import Batch
from adaptive.errors import MachineError, StoppedError, TrainingError
from adaptive.metrics import Measurement, measure_exits
from adaptive.networks.precision import autocast
from adaptive.training.active_phase import ActivePhase
from adaptive.training.checkpoints.saver import Saver
from adaptive.training.checkpoints.snapshot import capture, whole_weights, with_averaged_statistics
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore
from adaptive.training.engine.group import all_reduce
from adaptive.training.phases import set_modes
from adaptive.training.prepared_run import Prepared
from adaptive.training.run_progress import Progress
from adaptive.training.streams import Streams
from adaptive.training.supervision.own_time import OwnTime
from adaptive.training.supervision.supervisor import StopAskedError, Supervisor

Values = Mapping[str, Any]


class Callback:
    """Base class of what acts beside the training loop: one method for each moment at which it is called.

    On several ranks every rank calls every method, at the same steps.
    """

    def on_start(self, trainer: Trainer) -> None:
        """Act before the first step; how far a resumed run has come is known."""

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
        """Take a line for the user."""

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Act when the run ends, by itself or by an error."""


class Trainer:
    """Trains a network through all phases of a configuration, from wherever the run stands.

    Args:
        prepared: the run, checked and built.
        streams: where its batches come from.
        store: its checkpoints.
        callbacks: what records, validates, saves and shows, in the order in which they are called.
        supervisor: gets a heartbeat at every step, and knows whether the run was asked to stop.
    """

    def __init__(
        self,
        prepared: Prepared,
        streams: Streams,
        store: CheckpointStore,
        callbacks: Sequence[Callback],
        supervisor: Supervisor,
    ):
        self.prepared, self.streams, self.store = prepared, streams, store
        self.callbacks, self.supervisor = list(callbacks), supervisor
        self.config, self.batch, self.device = prepared.config, prepared.batch, prepared.device
        self.rank = prepared.ranks.rank
        self.saver = Saver(store, prepared.config.checkpoint, self._warn_about_saving)
        self.progress = Progress()
        self.resumed = False
        self.epoch_end_pending = False  # the last step ended an epoch, whose validation and saving are still to come
        self.score: float | None = None
        self.data_seconds = 0.0
        self.step_ended = time.perf_counter()
        self._active: ActivePhase | None = None
        self.stream, self.validation_stream = streams.train, streams.validation
        gathers = prepared.config.train.zero_stage == 3
        self.clock, self.validation_clock = (OwnTime(prepared.device, gathers) for _ in range(2))
        supervisor.clocks = {"training": self.clock, "validation": self.validation_clock}

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
    def epoch(self) -> int:
        """Number of the epoch that the last step belonged to, from 1."""
        return max(self.progress.step - 1, 0) // self.prepared.steps_per_epoch + 1

    @property
    def at_epoch_end(self) -> bool:
        """Whether the last step ended an epoch or the run."""
        return self.progress.step % self.prepared.steps_per_epoch == 0 or self.at_end

    @property
    def at_end(self) -> bool:
        """Whether no step is left."""
        return self.progress.step >= self.prepared.total_steps

    def run(self, checkpoint: Checkpoint | None = None) -> None:
        """Train to the end, from ``checkpoint`` where one is given.

        Raises:
            StoppedError: a rank was asked to stop; a checkpoint of the last step is written, if the disk has room.
            TrainingError: too many steps in a row had a gradient that is not finite.
            DataError: a sample cannot be read.
        """
        error: BaseException | None = None
        try:
            continued = self._load(checkpoint) if checkpoint else None
            self.supervisor.meet()
            self._notify("on_start")
            while self.progress.phase < len(self.prepared.plans) and (not self.at_end or self.epoch_end_pending):
                self._start_phase(continued)
                continued = None
                if self.epoch_end_pending:
                    self._end_epoch()
                for _ in self._steps():
                    self._notify("on_step")
                    # At the end there is nothing left to stop but the last validation.
                    if self._stop_asked() and not self.at_end:
                        self._stop()
                    if self.at_epoch_end:
                        self._end_epoch()
                self._end_phase()
        except BaseException as caught:
            error = caught
            raise
        finally:
            self.saver.close()
            for callback in self.callbacks:
                callback.on_end(self, error)

    def publish(self, values: Mapping[str, Any]) -> None:
        """Hand values to every callback, with the step, epoch and phase that they belong to."""
        plans = self.prepared.plans
        now = {"step": self.progress.step, "epoch": self.epoch, "samples": self.progress.samples}
        complete = {**now, "phase": plans[min(self.progress.phase, len(plans) - 1)].name, **values}
        with self.clock.part("records"):
            for callback in self.callbacks:
                callback.on_values(self, complete)

    def message(self, text: str) -> None:
        """Show the user a line."""
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

    def save(self, epoch_end_pending: bool = False) -> None:
        """Take a snapshot of this moment; rank 0 writes it, by default while training goes on (collective).

        Args:
            epoch_end_pending: this step ended an epoch, whose validation and saving are still to come.

        Raises:
            MachineError: rank 0 could not write the last ``checkpoint.max_failed`` ones; only it knows.
        """
        self._heartbeat("save")
        with self.clock.part("saving"):
            self.saver.wait()  # before the next snapshot takes memory
        tensors, state = capture(self.active.learner, keep=self.rank == 0)
        state |= {
            "progress": {**self.progress.as_dict(), "finished": self.at_end},
            "exits": self.prepared.network.exit_names,
            "collaboration": self.active.plan.collaboration,
            "classes": self.prepared.index.classes,
            "dataset": self.prepared.index.fingerprint,
            "world": self.batch.world,
            "drawn_by": self.streams.drawn_by,
            "closed": not epoch_end_pending,
        }
        if self.active.spikes is not None:
            state["spikes"] = self.active.spikes.state()
        if self.rank == 0:
            with self.clock.part("saving"):
                self.saver.save(self.progress.step, tensors, state, self.score, self.progress.phase, self.epoch)
        self._heartbeat("step")

    def finish_saving(self) -> None:
        """Wait until the run's last save is on disk (collective; raises MachineError on all ranks if it is not)."""
        self._heartbeat("save")
        self.saver.finish()

    def _warn_about_saving(self, text: str, failed: int) -> None:
        self.message(f"warning: {text}")
        if failed:
            self.publish({"checkpoint/failed": failed})

    def _measure(self, forward: Callable[[Tensor], list[Tensor]]) -> Measurement:
        clock, answered = self.validation_clock, time.perf_counter()
        clock.begin()

        def watched(images: Tensor) -> list[Tensor]:
            nonlocal answered
            self._heartbeat("step")
            clock.add("data", time.perf_counter() - answered)
            if self._stop_asked():
                raise StopAskedError
            with clock.computing():
                logits = forward(images)
            clock.step_done()
            answered = time.perf_counter()
            return logits

        stream, exits = self.validation_stream, len(self.prepared.network.exits)
        return measure_exits(watched, stream, exits, self.device, stream.total, all_reduce)

    def _heartbeat(self, stage: str) -> None:
        self.supervisor.heartbeat(stage, self.progress.step)

    def _stop_asked(self) -> bool:
        return self.supervisor.stop_asked(self.stream.bad.count + self.validation_stream.bad.count)

    def _notify(self, moment: str) -> None:
        for callback in self.callbacks:
            getattr(callback, moment)(self)

    def _end_epoch(self) -> None:
        """Validate, and save where that is due; a run that is stopped in here does so when it goes on."""
        try:
            self._notify("on_epoch_end")
        except StopAskedError:
            self._stop()
        self.epoch_end_pending = False
        self.clock.begin()

    def _stop(self) -> None:
        """Save and leave, all ranks together; a disk that is full just then does not make a failure of the stop."""
        self._heartbeat("save")
        outcome = f"saved in {self.store.folder}; the same command continues the run"
        try:
            self._notify("on_stop")
        except MachineError as trouble:
            outcome = f"not saved: {trouble}"
        signals = self.supervisor.signals
        reason = signals.received.name if signals and signals.received else "another rank"
        raise StoppedError(
            f"stopped by {reason} after step {self.progress.step} of {self.prepared.total_steps}, {outcome}"
        )

    def _load(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Take over how far the run has come, and its weights; returns the checkpoint if its phase is not over."""
        state = checkpoint.state()
        self.progress = Progress(**state["progress"])
        self.prepared.network.load_state_dict(checkpoint.tensors("weights"))
        self.resumed = True
        self.epoch_end_pending = not state.get("closed", True)
        if not self.epoch_end_pending and self._phase_done():
            self.progress.next_phase()  # it was saved as its phase ended: the next one starts from these weights
            return None
        return checkpoint

    def _phase_done(self) -> bool:
        return self.progress.phase_step >= self.prepared.phase_steps(self.progress.phase)

    def _start_phase(self, checkpoint: Checkpoint | None = None) -> None:
        """Begin the phase, or continue inside it from ``checkpoint``."""
        self._heartbeat("startup")
        self.supervisor.clock.done("records")
        self._active = ActivePhase.start(self.prepared, self.progress, checkpoint)
        self.active.around_communication(self._communicating)
        self.supervisor.clock.done("engine")
        self.clock.begin()

    def _end_phase(self) -> None:
        """Copy the learned weights to the template, from which the next phase starts."""
        self.prepared.network.load_state_dict(whole_weights(self.active.engine, self.active.network))
        self.active.engine.destroy()
        if self._phase_done():
            self.progress.next_phase()
        self._active = None

    def _steps(self) -> Iterator[None]:
        """Run the phase's remaining steps, yielding after each."""
        active, progress = self.active, self.progress
        batches = self.stream.batches(progress.step, active.last_step)
        try:
            while progress.step < active.last_step:
                applied = self._step(batches)
                progress.advance(applied, self.batch.global_batch)
                self._heartbeat("step")
                self.supervisor.first_step_done()
                if (line := self.supervisor.clock.finish()) is not None:
                    self.message(line)
                if applied:
                    self._follow_applied_step()
                self.step_ended = time.perf_counter()
                self.clock.step_done()
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
            waited = time.perf_counter() - waiting
            self.data_seconds += waited
            self.clock.add("data", waited)
            with self.clock.computing():
                for callback in self.callbacks:
                    callback.on_batch(self, batch)
                labels = batch.labels.to(self.device, non_blocking=True)
                loss = active.task.loss(batch.images, labels, (self.progress.step, self.rank, micro))
            last = micro == self.batch.accumulation - 1
            if active.spikes:
                losses += loss.detach() / (self.batch.accumulation * self.batch.world)
                if last and active.spikes.is_spike(all_reduce(losses).item()):
                    loss = loss * float("nan")  # a gradient that is not finite is skipped alike at every ZeRO stage
            active.engine.backward(loss)
            if last:
                self._notify("on_gradients")
            applied = active.engine.step()
        return applied

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        """Surround every exchange inside of a forward pass and loss: it is no rank's own time."""
        with self.clock.communicating(), self.validation_clock.communicating():
            yield

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
