"""Signals by which somebody asks a run to stop: noted by a thread, so that no long call in C can hide them.

SIGUSR1 (Slurm's ``--signal=USR1@300``), SIGTERM (schedulers), SIGINT (Ctrl-C) and SIGHUP (a terminal or connection that
is lost) ask. Before the first step there is nothing to save, and the process leaves at once; afterwards the trainer
polls `StopSignals.asked`, saves, and ends with `EXIT_INTERRUPTED`. SIGTERM or SIGINT after that ends the process at
once.

One wish may come by several ways, and is one: Slurm signals the tasks and the batch script that passes it on; Ctrl-C
reaches a whole process group, and the launcher in it sends its ranks SIGTERM as well (deepspeed) or SIGINT (torchrun);
a lost terminal sends SIGHUP by the kernel and by the shell. So SIGUSR1 and SIGHUP again change nothing, nor does
the first SIGTERM after SIGINT or SIGHUP, nor SIGINT within `PASSED_ON` seconds of another.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from adaptive.errors import EXIT_INTERRUPTED

ASKING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HUMAN = (signal.SIGINT, signal.SIGHUP)  # of a terminal: nohup and shells let a process ignore them, which stays so
PASSED_ON = 1.0  # seconds within which a launcher passes Ctrl-C on; who presses it again takes longer


class StopSignals:
    """Listens for the signals that ask this process to stop; ``immediate`` while there is nothing to save."""

    def __init__(self) -> None:
        self.immediate = True
        self.received: signal.Signals | None = None
        self._heard = 0.0  # when the first signal came, as of time.monotonic
        self._passed_on = False
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
            if number not in HUMAN or signal.getsignal(number) is not signal.SIG_IGN:
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
        if self.received is None:
            self.received, self._heard = number, time.monotonic()
            if self.immediate:
                _leave(EXIT_INTERRUPTED, f"{number.name} before the first step: nothing to save, start again to go on")
        elif not self._is_the_same_wish(number):
            first = self.received.name
            _leave(128 + number, f"{number.name} came after {first}: ended at once, without saving")

    def _is_the_same_wish(self, number: signal.Signals) -> bool:
        """Whether a further signal is the first one, which comes by another way; see the module's description."""
        if number == signal.SIGINT and self.received == signal.SIGINT:
            return time.monotonic() - self._heard < PASSED_ON
        if number == signal.SIGTERM and self.received in HUMAN and not self._passed_on:
            self._passed_on = True
            return True
        return number in (signal.SIGUSR1, signal.SIGHUP)


def _noted_elsewhere(number: int, frame: object) -> None:
    """Python needs a handler to write the number; the thread acts on it."""


def _leave(code: int, message: str, leave: Callable[[int], None] = os._exit) -> None:
    rank = os.environ.get("RANK", "0")
    with suppress(OSError, ValueError, AttributeError):  # the terminal may be what has gone
        print(f"adaptive train: rank {rank}: {message}", file=sys.stderr, flush=True)
    leave(code)
