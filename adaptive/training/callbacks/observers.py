"""Where published values go: the record, the console, the dashboard. They live on rank 0 alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptive.reporting.console import Console, per_exit
from adaptive.reporting.dashboard import Dashboard
from adaptive.reporting.record import Record
from adaptive.training.callbacks.base import Callback, Values

if TYPE_CHECKING:
    from adaptive.training.trainer import Trainer


class RecordObserver(Callback):
    """Appends every published value to metrics.jsonl, the log of record."""

    def __init__(self, record: Record):
        self.record = record

    def on_start(self, trainer: Trainer) -> None:
        """Drop what an interrupted run recorded beyond the step it is continued from."""
        self.record.trim(trainer.progress.step if trainer.resumed else -1)

    def on_values(self, trainer: Trainer, values: Values) -> None:
        """Write one line."""
        self.record.write(dict(values))


class ConsoleObserver(Callback):
    """Shows progress to the reader."""

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
    """Passes values on to W&B; its failures are warnings."""

    def __init__(self, dashboard: Dashboard):
        self.dashboard = dashboard

    def on_values(self, trainer: Trainer, values: Values) -> None:
        """Send one set of values."""
        self.dashboard.log(values, trainer.progress.step)

    def on_end(self, trainer: Trainer, error: BaseException | None) -> None:
        """Close the run."""
        self.dashboard.finish(0 if error is None else 1)
