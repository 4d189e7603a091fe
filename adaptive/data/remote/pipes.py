"""Datasets behind a shell command (``pipe:COMMAND {}``) that writes a file to its standard output.

The one module that starts a shell: only with data.pipe = true, and with the file's name quoted.
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

from adaptive.data.remote.transfer import ByteCounter, RemoteFolder, StartedTransfer, in_thread
from adaptive.errors import ConfigError
from adaptive.foreign_text import PIPE, shown_location, without_secrets_of

_PLACEHOLDER = "{}"
_CHUNK = 1 << 20
_STDERR_BYTES = 2000  # the last ones of a command's error output are kept


@dataclass(frozen=True)
class PipeFolder(RemoteFolder):
    """A folder whose files a command of the form ``pipe:COMMAND {}`` writes to its standard output."""

    def __post_init__(self) -> None:
        if _PLACEHOLDER not in self.location:
            where = shown_location(self.location)
            raise ConfigError(f"data.path = {where!r} names no file: write {{}} where the file's name belongs")

    def command(self, name: str) -> str:
        """Return the command line for one file."""
        return self.location.removeprefix(PIPE).replace(_PLACEHOLDER, shlex.quote(name))

    def shown(self, name: str) -> str:
        """Return the file's name, and that a command reads it; the command itself may hold a key."""
        return f"{name} of {shown_location(self.location)}"

    def reason(self, error: BaseException) -> str:
        """Return why an attempt failed, without the command's words."""
        return without_secrets_of(self.location, super().reason(error))

    def start(self, name: str, path: Path, received: ByteCounter) -> StartedTransfer[None]:
        """Start the command."""
        process = subprocess.Popen(
            self.command(name),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        return StartedTransfer(in_thread(lambda: _drain(process, path, received)), lambda: _end(process))

    def start_size(self, name: str) -> StartedTransfer[int | None]:
        """Return no size: a command's output has none before it has run."""
        future: Future[int | None] = Future()
        future.set_result(None)
        return StartedTransfer(future)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a command and everything it started, unless it has ended."""
    if process.poll() is not None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _drain(process: subprocess.Popen[bytes], path: Path, received: ByteCounter) -> None:
    """Write a command's output to a file (raises OSError when the command fails)."""
    assert process.stdout is not None
    assert process.stderr is not None
    errors = bytearray()
    stderr = process.stderr

    def listen() -> None:
        while chunk := stderr.read1(_CHUNK):  # type: ignore[attr-defined]
            errors.extend(chunk)
            del errors[:-_STDERR_BYTES]

    listener = threading.Thread(target=listen, name="pipe-errors", daemon=True)
    listener.start()
    try:
        with path.open("wb") as file:
            while chunk := process.stdout.read1(_CHUNK):  # type: ignore[attr-defined]
                file.write(chunk)
                received.relative_update(len(chunk))
        code = process.wait()
    finally:
        _end(process)
        process.wait()
        process.stdout.close()
    listener.join(1)
    if code:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise OSError(f"exit code {code}{f': {last}' if last else ''}")
