"""Signals by which a scheduler asks a run to stop: noted by a thread, so that no long call in C can hide them.

SIGUSR1 (Slurm's ``--signal=USR1@300``) and SIGTERM ask. Before the first step there is nothing to save, and the process
leaves at once; afterwards the trainer polls `StopSignals.asked`, saves, and ends with `EXIT_INTERRUPTED`. SIGTERM after
either ends the process at once; SIGUSR1 again is the same wish, which may come by two ways.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable

from adaptive.errors import EXIT_INTERRUPTED

ASKING = (signal.SIGUSR1, signal.SIGTERM)


class StopSignals:
    """Listens for the signals that ask this process to stop; ``immediate`` while there is nothing to save."""

    def __init__(self) -> None:
        self.immediate = True
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}
        self._ends: tuple[socket.socket, socket.socket] | None = None

    @property
    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.received is not None

    def listen(self) -> StopSignals:
        """Take over the signals; call in the main thread, before anything that takes long."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in ASKING:
            self._previous[number] = signal.signal(number, _noted_elsewhere)
        # Python writes each signal's number here in its C handler, while the main thread may be deep in a library.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._ends = reader, writer
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        return self

    def ignore(self) -> None:
        """Ignore the signals from now on: the work is done and saved, and nothing may turn success into failure."""
        for number in ASKING:
            signal.signal(number, signal.SIG_IGN)
        self._close()

    def restore(self) -> None:
        """Give the signals back to whom they belonged before ``listen``."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._close()

    def _close(self) -> None:
        if self._ends is not None:
            signal.set_wakeup_fd(-1)
            _, writer = self._ends
            self._ends = None
            writer.close()  # ends the thread, which closes the other end

    def _watch(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in ASKING:
                        self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        if self.received is not None and number == signal.SIGUSR1:
            return
        if self.received is not None:
            _leave(128 + number, f"{number.name} came after {self.received.name}: ended at once, without saving")
        self.received = number
        if self.immediate:
            _leave(EXIT_INTERRUPTED, f"{number.name} before the first step: nothing to save, start again to go on")


def _noted_elsewhere(number: int, frame: object) -> None:
    """Python needs a handler to write the number; the thread acts on it."""


def _leave(code: int, message: str, leave: Callable[[int], None] = os._exit) -> None:
    rank = os.environ.get("RANK", "0")
    print(f"adaptive train: rank {rank}: {message}", file=sys.stderr, flush=True)
    leave(code)
