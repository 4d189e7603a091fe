"""Ends a process that hangs, instead of letting a job burn its hours, and leaves every thread's stack behind.

Each stage of a run has its own limit. A thread watches them; should it be kept from running as well, because a library
hangs while it holds Python's lock, faulthandler's own thread ends the process a little later.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

from adaptive.errors import EXIT_HUNG

GRACE = 15.0  # seconds after which faulthandler acts in place of the thread
STACKS = "stacks-rank-{rank}.txt"


class Watchdog:
    """Watches the time since the last heartbeat against the limit of the stage that the process is in.

    Args:
        folder: where the stacks go (``stacks-rank-0.txt``); standard error if it cannot be written.
        rank: this process's number.
        limits: seconds by stage; 0 leaves a stage unwatched.
    """

    def __init__(self, folder: Path, rank: int, limits: Mapping[str, float]) -> None:
        self.folder, self.rank, self.limits = folder, rank, dict(limits)
        self.account: Callable[[], str] = str  # what is known of the other ranks; it may take some seconds
        self._stage, self._due = "", 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, stage: str) -> Watchdog:
        """Begin to watch, in ``stage``."""
        self.heartbeat(stage)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def heartbeat(self, stage: str) -> None:
        """Note that the process lives; from here on the limit of ``stage`` counts."""
        limit = self.limits.get(stage, 0.0)
        self._stage = stage
        self._due = time.monotonic() + limit if limit else float("inf")
        if limit:
            faulthandler.dump_traceback_later(limit + GRACE, exit=True)
        else:
            faulthandler.cancel_dump_traceback_later()

    def end(self) -> None:
        """Watch no longer."""
        self._stop.set()
        self._due = float("inf")
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            if time.monotonic() > self._due:
                self._end_process()

    def _end_process(self) -> None:
        stage = self._stage
        key = f"train.{stage}_timeout"
        text = f"no heartbeat for {self.limits[stage]:g} s in stage {stage!r} ({key}): "
        where = self._write_stacks(text)
        faulthandler.dump_traceback_later(4 * GRACE, exit=True)
        others = self.account()
        others, node = f"{others}; " if others else "", socket.gethostname().partition(".")[0]
        print(
            f"adaptive train: error: rank {self.rank} on {node}: {text}{others}the process ends; stacks of all "
            f"threads are in {where}. Look there for what it waited for; raise {key} if it was only slow",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_HUNG)

    def _write_stacks(self, text: str) -> str:
        path = self.folder / STACKS.format(rank=self.rank)
        try:
            with path.open("a", encoding="utf-8") as file:
                _dump(file, text)
        except OSError:
            _dump(sys.stderr, text)
            return "this log"
        return str(path)


def _dump(file: TextIO, text: str) -> None:
    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {os.getpid()}: {text}\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.flush()
