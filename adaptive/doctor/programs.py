"""Programs that checks start, each in a process group of its own with a time limit: at its end all of it is killed."""

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
from typing import Any

from adaptive.files import code_root


@dataclass(frozen=True)
class ProgramResult:
    """What a program printed and its exit code, None if it had to be killed or could not be started."""

    code: int | None
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The last line that it printed, for a finding."""
        lines = [line.strip() for line in (self.err or self.out).splitlines() if line.strip()]
        return lines[-1][:300] if lines else f"exit code {self.code}"


_UNFINISHED: set[int] = set()


@atexit.register
def _end_unfinished() -> None:
    """Kill the programs that an interrupted or hanging check has left."""
    for group in _UNFINISHED:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


class RunningProgram:
    """A program that was started, in a process group of its own."""

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

    def wait(self, seconds: float) -> ProgramResult:
        """Wait for its end, or kill it and all that it started."""
        try:
            out, err = self.process.communicate(timeout=seconds)
            return ProgramResult(self.process.returncode, out, err)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
            return ProgramResult(None, out, f"{err}\nno answer within {seconds:g} s")
        finally:
            if self.process.returncode is not None:
                _UNFINISHED.discard(self.process.pid)


def run_program(words: list[str], seconds: float) -> ProgramResult:
    """Run a program, for at most ``seconds``, and return its result."""
    try:
        return RunningProgram(words).wait(seconds)
    except OSError as problem:
        return ProgramResult(None, "", f"{words[0]}: {problem.strerror}")


def start_script(name: str, *words: str, environment: Mapping[str, str] | None = None) -> RunningProgram:
    """Start a module of this folder as a program in a fresh interpreter, from the code that runs here."""
    own = dict(os.environ if environment is None else environment)
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(code_root()), own.get("PYTHONPATH"))))
    return RunningProgram([sys.executable, "-P", "-m", f"adaptive.doctor.{name}", *words], own)


def answer(result: ProgramResult) -> dict[str, Any]:
    """Return the JSON object that a script printed as its last line; ``{"error": reason}`` if it did not."""
    lines = result.out.strip().splitlines()
    if result.code == 0 and lines:
        return dict(json.loads(lines[-1]))
    if result.code is not None and result.code < 0:
        return {"error": f"killed by {signal.Signals(-result.code).name}"}
    return {"error": result.reason}
