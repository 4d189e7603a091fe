"""Callbacks that write published values to the record, the console and the dashboard, on rank 0 alone."""

from __future__ import annotations

from typing import Any

from adaptive.errors import MachineError, StoppedError, TrainingError
from adaptive.tracking.console import Console
from adaptive.tracking.dashboard import Dashboard
from adaptive.tracking.record import Record, read
from adaptive.tracking.record_keys import per_exit
from adaptive.training.checkpoints.store import Checkpoint
from adaptive.training.trainer import Callback, Trainer, Values

MOST_WAITING = 100_000  # records; a run that cannot write so many has no log any more


class RecordObserver(Callback):
    """Appends every published value to metrics.jsonl, the log of record.

    Where the disk is full the records wait in memory, and are written as soon as there is room.
    """

    def __init__(self, record: Record):
        self.record = record
        self.waiting: list[dict[str, Any]] = []

    def on_start(self, trainer: Trainer) -> None:
        """Drop what an interrupted run recorded beyond the step it is continued from."""
        self.record.trim(trainer.progress.step if trainer.resumed else -1, validated=not trainer.epoch_end_pending)

    def on_values(self, trainer: Trainer, values: Values) -> None:
        """Write one line, after those that wait."""
        self.waiting.append(dict(values))
        had_to_wait = len(self.waiting) > 1
        try:
            self._write()
        except MachineError as error:
            if not had_to_wait:
                trainer.message(f"{error}. Training goes on; the records wait in memory")
            if len(self.waiting) >= MOST_WAITING:
                raise

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Write what waits; a run that succeeded but for this fails here."""
        try:
            self._write()
        except MachineError as full:
            if error is None:
                raise
            trainer.message(f"{len(self.waiting)} records are lost: {full}")

    def _write(self) -> None:
        while self.waiting:
            self.record.write(self.waiting[0])
            del self.waiting[0]


class ConsoleObserver(Callback):
    """Shows progress to the user."""

    def __init__(self, console: Console):
        self.console = console

    def on_step(self, trainer: Trainer) -> None:
        """Move the progress bar."""
        self.console.update(trainer.progress.step)

    def on_values(self, trainer: Trainer, values: Values) -> None:
        """Print training and validation values."""
        if any(key.startswith("train/") for key in values):
            self.console.train(values)
        if any(key.startswith("val/") for key in values):
            self.console.validation(values)
        averaged = per_exit(values, "val_ema", "top1")
        if averaged:
            self.console.message(f"moving average: top1 {'/'.join(f'{top1:.1f}' for top1 in averaged.values())}")

    def on_message(self, trainer: Trainer, text: str) -> None:
        """Print a line."""
        self.console.message(text)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Give the terminal back."""
        self.console.close()


class DashboardObserver(Callback):
    """Passes values on to W&B; its failures are warnings.

    A run that is continued repeats the steps since its checkpoint. W&B's history cannot be cut back as the record is,
    and has most of them: those are not sent again. What an earlier start recorded and W&B did not get is sent first.
    """

    def __init__(self, dashboard: Dashboard, record: Record):
        self.dashboard, self.record = dashboard, record
        self._shown: Checkpoint | None = None
        self._best: tuple[int, float, int] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Find the best checkpoint so far, and send what the dashboard has missed."""
        self._best = max((c.merit for c in trainer.store.all() if c.score is not None), default=None)
        if trainer.resumed and self.record.path.exists():
            for values in read(self.record.path):
                self._send(values)

    def on_values(self, trainer: Trainer, values: Values) -> None:
        """Send one set of values."""
        self._send(values)

    def _send(self, values: Values) -> None:
        """Pass on what the dashboard has not; what does not change goes into the run's summary."""
        constants = {key: value for key, value in values.items() if key.startswith("model/")}
        if constants:
            self.dashboard.summary(constants)
        elif not self.dashboard.shown.has(values):
            self.dashboard.log(values, values["step"])

    def on_step(self, trainer: Trainer) -> None:
        """Show a checkpoint that has come to the disk meanwhile."""
        saved = trainer.saver.saved
        if saved is None or saved is self._shown:
            return
        self._shown = saved
        aliases = ["latest", f"step-{saved.step}"]
        if saved.score is not None and (self._best is None or saved.merit >= self._best):
            self._best = saved.merit
            aliases.append("best")
        self.dashboard.checkpoint(saved.path, aliases, {"step": saved.step, "score": saved.score, "epoch": saved.epoch})

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Show the last checkpoint, say what went wrong, and close the run."""
        self.on_step(trainer)
        stopped = isinstance(error, StoppedError)
        if error is not None:
            what = "was asked to stop" if stopped else "diverged" if isinstance(error, TrainingError) else "failed"
            step = trainer.progress.step
            self.dashboard.alert(f"{trainer.config.train.run_folder} {what} at step {step}", str(error), not stopped)
        self.dashboard.finish(0 if error is None else 1, preempted=stopped)
