"""Console output of training: a progress bar on a terminal, one line per record in a log file."""

from __future__ import annotations

import functools
import logging
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TextIO, TypeVar

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from adaptive.foreign_text import say, shown
from adaptive.tracking.record_keys import per_exit

LOGGER = logging.getLogger(__name__)
Values = Mapping[str, Any]
Method = TypeVar("Method", bound=Callable[..., None])


def _observing(method: Method) -> Method:
    """Decorate a method so that its failure does not stop the run: the console is switched off, with one warning."""

    @functools.wraps(method)
    def guarded(self: Console, *arguments: Any) -> None:
        if not self.enabled:
            return
        try:
            method(self, *arguments)
        except Exception as error:
            self.enabled = False
            LOGGER.warning("console output stops here, the run goes on: %s: %s", type(error).__name__, error)

    return guarded  # type: ignore[return-value]


class Console:
    """Shows progress and records; pass ``enabled=False`` on every rank but 0, and nothing is printed.

    ``train`` and ``validation`` take a record (the keys of ``metrics.jsonl``; accuracies in percent) and show
    ``epoch``, ``step``, ``train/loss``, ``train/exit_*/top1``, ``train/lr``, ``train/images_per_second`` and
    ``val/exit_*/top1``, ``top5``, ``loss`` where present.

    Args:
        total_steps: steps of the whole run.
        enabled: whether to print at all.
        stream: where to; standard output by default. A terminal gets a live bar, anything else plain lines.
        epochs: epochs of the whole run, shown behind the current one; 0 if unknown.
        watched: whether a terminal is what somebody looks at. mpirun gives its processes one, whose output it may
            write to a file.
    """

    def __init__(
        self, total_steps: int, enabled: bool, stream: TextIO | None = None, epochs: int = 0, watched: bool = True
    ) -> None:
        self.total_steps = total_steps
        self.enabled = enabled
        self.epochs = epochs
        self._stream = stream or sys.stdout
        self._started: tuple[float, int] | None = None
        self._progress: Progress | None = None
        if enabled and watched and self._stream.isatty():
            self._progress = _progress(self._stream)
            self._task = self._progress.add_task("", total=total_steps, figures="", eta="-:--:--")

    @_observing
    def update(self, step: int) -> None:
        """Move the bar to ``step``; the first call starts the clock."""
        if self._started is None:
            self._started = (time.monotonic(), step)
        if self._progress is not None:
            self._progress.start()
            self._progress.update(self._task, completed=step, eta=self._eta(step))

    @_observing
    def train(self, values: Values) -> None:
        """Show one training record."""
        self.update(int(values["step"]))
        if self._progress is not None:
            self._progress.update(self._task, figures="  ".join(self._figures(values, last_exit_only=True)))
            return
        step = f"step {values['step']}/{self.total_steps}"
        eta = f"eta {self._eta(int(values['step']))}"
        self._print(" ".join([*self._epoch(values), step, *self._figures(values), eta]))

    @_observing
    def validation(self, values: Values) -> None:
        """Show one validation record: every exit's accuracy."""
        if self._progress is not None:
            title = " ".join(["validation", *self._epoch(values), f"step {values['step']}"])
            self._progress.console.print(title)
            self._progress.console.print(_validation_table(values))
            return
        parts = ["validation", *self._epoch(values), f"step {values['step']}/{self.total_steps}"]
        for name in ("loss", "top1", "top5"):
            figures = per_exit(values, "val", name)
            if figures:
                digits = 3 if name == "loss" else 1
                parts.append(f"{name} {'/'.join(f'{figure:.{digits}f}' for figure in figures.values())}")
        self._print(" ".join(parts))

    @_observing
    def message(self, text: str) -> None:
        """Print a line of text, above the bar where there is one."""
        if self._progress is not None:
            self._progress.console.print(shown(text), markup=False, emoji=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    @_observing
    def close(self) -> None:
        """Stop the progress bar, and restore the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, line: str) -> None:
        say(line, file=self._stream)

    def _epoch(self, values: Values) -> list[str]:
        if "epoch" not in values:
            return []
        return [f"epoch {values['epoch']:g}" + (f"/{self.epochs}" if self.epochs else "")]

    def _figures(self, values: Values, last_exit_only: bool = False) -> list[str]:
        """Return loss, top-1, learning rate and speed as short texts, each where present."""
        parts = self._epoch(values) if last_exit_only else []
        if "train/loss" in values:
            parts.append(f"loss {values['train/loss']:.3f}")
        top1 = list(per_exit(values, "train", "top1").values())[-1 if last_exit_only else 0 :]
        if top1:
            parts.append(f"top1 {'/'.join(f'{accuracy:.1f}' for accuracy in top1)}")
        if "train/lr" in values and not last_exit_only:
            parts.append(f"lr {values['train/lr']:.4g}")
        if "train/images_per_second" in values:
            parts.append(f"{values['train/images_per_second']:.0f} images/s")
        return parts

    def _eta(self, step: int) -> str:
        """Return the time left at the average pace since the first update (pauses for validation included)."""
        if self._started is None or step <= self._started[1]:
            return "-:--:--"
        begin, first = self._started
        seconds = (time.monotonic() - begin) * max(self.total_steps - step, 0) / (step - first)
        return str(timedelta(seconds=round(seconds)))


def _progress(stream: TextIO) -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TextColumn("eta {task.fields[eta]}"),
        console=RichConsole(file=stream),
        refresh_per_second=4,
    )


def _validation_table(values: Values) -> Table:
    table = Table()
    table.add_column("exit", justify="right")
    columns = {name: per_exit(values, "val", name) for name in ("top1", "top5", "loss")}
    columns = {name: figures for name, figures in columns.items() if figures}
    for name in columns:
        table.add_column({"top1": "top-1 %", "top5": "top-5 %"}.get(name, name), justify="right")
    for exit_number in sorted({number for figures in columns.values() for number in figures}):
        cells = [
            f"{figures[exit_number]:.{3 if name == 'loss' else 2}f}" if exit_number in figures else ""
            for name, figures in columns.items()
        ]
        table.add_row(str(exit_number), *cells)
    return table
