"""Progress of packing, verifying and indexing on stderr: a bar on a terminal, a line every ten seconds in a log."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from adaptive.foreign_text import shown as fit

_LINE_EVERY = 10.0  # seconds


def listing(source: str | Path, shown: bool) -> AbstractContextManager[object]:
    """Show on a terminal that images are being listed, which takes minutes for a million of them."""
    console = Console(stderr=True)
    return (
        console.status(f"listing the images of {escape(fit(source))}")
        if shown and console.is_terminal
        else nullcontext()
    )


class PackProgress:
    """A progress bar that counts images, as a context manager; shows nothing unless ``shown``."""

    def __init__(self, total: int, done: int, shown: bool, doing: str = "packing", did: str = "packed") -> None:
        self._did = did
        self._console = Console(stderr=True, quiet=not shown)
        self._total = total
        self._done = done
        self._printed = time.monotonic()
        columns = (TextColumn(doing), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not (shown and self._console.is_terminal))
        self._task = self._bar.add_task(doing, total=total, completed=done)

    def __enter__(self) -> PackProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, images: int) -> None:
        """Count further images as done."""
        self._done += images
        self._bar.advance(self._task, images)
        if not self._console.is_terminal and time.monotonic() - self._printed >= _LINE_EVERY:
            self._printed = time.monotonic()
            self._console.print(f"{self._did} {self._done} of {self._total} images", highlight=False)
