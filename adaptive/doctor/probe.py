"""Programs and scripts that checks start: bounded in time, with everything they started ended with them."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a program ended: ``code`` is None if it had to be killed or could not be started."""

    code: int | None
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The last line of what it said, for a finding."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.code}"


_UNFINISHED: set[int] = set()


@atexit.register
def _end_unfinished() -> None:
    """End what an interrupted or hanging check has left."""
    for group in _UNFINISHED:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class Running:
    """A program of its own process group."""

    def __init__(self, words: list[str], environment: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=None if environment is None else dict(environment),
            start_new_session=True,
        )
        _UNFINISHED.add(self.process.pid)

    def wait(self, seconds: float) -> Ended:
        """Wait for its end, or kill it and all that it started."""
        try:
            out, err = self.process.communicate(timeout=seconds)
            return Ended(self.process.returncode, out, err)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
            return Ended(None, out, f"{err}\nno answer within {seconds:g} s")
        finally:
            if self.process.returncode is not None:
                _UNFINISHED.discard(self.process.pid)


def run_program(words: list[str], seconds: float) -> Ended:
    """Run a program to its end."""
    try:
        return Running(words).wait(seconds)
    except OSError as problem:
        return Ended(None, "", f"{words[0]}: {problem.strerror}")


def start_script(name: str, *words: str, environment: Mapping[str, str] | None = None) -> Running:
    """Start a script of this folder in a fresh interpreter (``-P``: its neighbours are no modules for it)."""
    return Running([sys.executable, "-P", str(Path(__file__).with_name(name)), *words], environment)


def answer(ended: Ended) -> dict[str, Any]:
    """Return the JSON object that a script printed as its last line; ``{"error": reason}`` if it did not."""
    lines = ended.out.strip().splitlines()
    if ended.code == 0 and lines:
        return dict(json.loads(lines[-1]))
    if ended.code is not None and ended.code < 0:
        return {"error": f"killed by {signal.Signals(-ended.code).name}"}
    return {"error": ended.reason}
