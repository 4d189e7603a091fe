"""Files that a command of the user's writes to its standard output: the one place that starts a shell.

Only with data.pipe = true; the file's name is quoted, whatever it holds.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adaptive.data.remote.transfer import Arrivals, RemoteFolder, StartedTransfer, in_thread
from adaptive.errors import ConfigError

PIPE = "pipe:"
_PLACE = "{}"
_CHUNK = 1 << 20
_TOLD = 2000  # bytes of a command's error output that are kept


@dataclass(frozen=True)
class PipeFolder(RemoteFolder):
    """Files by a command of the form ``pipe:COMMAND {}``."""

    def __post_init__(self) -> None:
        if _PLACE not in self.location:
            raise ConfigError(f"data.path = {self.location!r} names no file: write {{}} where the file's name belongs")

    def command(self, name: str) -> str:
        """Return the shell's words for one file."""
        return self.location.removeprefix(PIPE).replace(_PLACE, shlex.quote(name))

    def shown(self, name: str) -> str:
        """Return the command."""
        return f"{PIPE}{self.command(name)}"

    def start(self, name: str, path: Path, arrivals: Arrivals) -> StartedTransfer[None]:
        """Begin to run the command."""
        process = subprocess.Popen(
            self.command(name),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return StartedTransfer(in_thread(lambda: _drain(process, path, arrivals)), lambda: _end(process))

    def start_size(self, name: str) -> StartedTransfer[int | None]:
        """Answer at once: a command's output has no size before it has run."""
        future: Future[int | None] = Future()
        future.set_result(None)
        return StartedTransfer(future)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and everything it started, unless it has ended."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _drain(process: subprocess.Popen[bytes], path: Path, arrivals: Arrivals) -> None:
    """Write a command's output to a file (raises OSError when the command fails)."""
    assert process.stdout is not None
    assert process.stderr is not None
    errors = bytearray()
    told = process.stderr

    def listen() -> None:
        while chunk := told.read1(_CHUNK):  # type: ignore[attr-defined]
            errors.extend(chunk)
            del errors[:-_TOLD]

    listener = threading.Thread(target=listen, name="pipe-errors", daemon=True)
    listener.start()
    try:
        with path.open("wb") as file:
            while chunk := process.stdout.read1(_CHUNK):  # type: ignore[attr-defined]
                file.write(chunk)
                arrivals.relative_update(len(chunk))
        code = process.wait()
    finally:
        _end(process)
        process.wait()
        process.stdout.close()
    listener.join(1)
    if code:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise OSError(f"exit code {code}{f': {last}' if last else ''}")
