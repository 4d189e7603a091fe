"""Standard input, output and error, whatever they are: closed, a pipe whose reader has gone, a file on a full disk.

A command's answer goes to standard output. Where it cannot get there the command ends with one line and code 1; where
its reader has had enough (``| head``) it ends in silence with 141, as programs do that SIGPIPE ends. Training has
another result than what it prints: after `observe_only` output that cannot be written is left out, and nothing ends.
Standard error is left out so for every command: who could be told?
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from adaptive.errors import AdaptiveError
from adaptive.foreign_text import HarmlessLog

EXIT_NO_READER = 128 + signal.SIGPIPE
_NAMES = {1: "stdout", 2: "stderr"}


class OutputLostError(AdaptiveError):
    """Standard output could not be written."""

    def __init__(self, error: OSError) -> None:
        super().__init__(
            f"standard output cannot be written: {error.strerror}; what would have been printed is lost, so send it "
            "elsewhere and call again"
        )
        self.no_reader = error.errno == errno.EPIPE
        self.exit_code = EXIT_NO_READER if self.no_reader else 1

    def told(self, command: str, rank: int = 0) -> str:
        """Return the line for standard error; none where the reader has gone, who knows."""
        return "" if self.no_reader else super().told(command, rank)


class Descriptor(io.RawIOBase):
    """A file descriptor to write to; what cannot be written is lost, and raises OutputLostError unless ``observing``.

    Args:
        number: of the descriptor.
        observing: whether what it gets is nobody's answer.
        trouble: why nothing can be written, where that is known before.
    """

    def __init__(self, number: int, observing: bool, trouble: OSError | None = None) -> None:
        self._number, self.observing, self._trouble = number, observing, trouble

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Whether a terminal is behind it."""
        return self._trouble is None and os.isatty(self._number)

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: Any, /) -> int:
        """Write all of ``data``, also where another program has made the descriptor one that does not wait."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view) and self._trouble is None:
            try:
                written += os.write(self._number, view[written:])
            except BlockingIOError:
                select.select([], [self._number], [])
            except OSError as error:
                self._trouble = error
        if self._trouble is not None and not self.observing:
            raise OutputLostError(self._trouble)
        return len(view)


def prepare() -> None:
    """Let the three streams be what this module says, take any text, and warnings of this process be `shown`.

    Call before anything is opened: a closed descriptor's number would go to the next file, a checkpoint say, and get
    what libraries print.
    """
    closed = _plug()
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 - until the process ends
    for number, name in _NAMES.items():
        stream: TextIO | None = getattr(sys, name)
        if stream is None or number in closed:
            setattr(sys, name, _text(number, None, closed=True))
        elif isinstance(stream, io.TextIOWrapper) and _number_of(stream) == number and _raw(stream) is None:
            with suppress(OSError):
                stream.flush()
            setattr(sys, name, _text(number, stream, closed=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(HarmlessLog())


def observe_only() -> None:
    """From now on what is printed is nobody's answer: output that cannot be written is left out."""
    raw = _raw(sys.stdout)
    if raw is not None:
        raw.observing = True


def finish() -> None:
    """Write what waits in standard output (raises OutputLostError); Python's own end would report a failure at length.

    Call again after an error: the second time nothing is raised.
    """
    raw = _raw(sys.stdout)
    try:
        sys.stdout.flush()
    finally:
        if raw is not None:
            raw.observing = True


def _plug() -> set[int]:
    """Open /dev/null in place of closed descriptors; return which these were."""
    closed = set()
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            closed.add(number)
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    return closed


def _text(number: int, like: io.TextIOWrapper | None, closed: bool) -> TextIO:
    raw = Descriptor(number, number == 2, OSError(errno.EBADF, "it is closed") if closed else None)
    unbuffered = like is not None and like.write_through
    buffer: Any = raw if unbuffered else io.BufferedWriter(raw)  # as Python itself does it, with -u and without
    return io.TextIOWrapper(
        buffer,
        encoding=like.encoding if like else "utf-8",
        errors="backslashreplace",
        line_buffering=like.line_buffering if like else False,
        write_through=unbuffered,
    )


def _raw(stream: TextIO | None) -> Descriptor | None:
    """Return what this module put below a stream, or None."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, Descriptor) else None


def _number_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None
