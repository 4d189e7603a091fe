"""Runs the parts of a visit one after another, each in processes of its own and within its time."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from adaptive.errors import ConfigError
from adaptive.files import write_atomically
from benchmarks.gpu_run.parts import Part, Visit
from benchmarks.shared.locations import REPOSITORY
from benchmarks.shared.results import machine

LEFT = 75  # exit code where something is left for --resume
LIMIT = -1  # for the exit code of a benchmark that ran, and in which a limit does not hold
DONE = ("passed", "a limit does not hold")  # what needs not be run again
LEAST_SECONDS = 20.0  # a part begins only where so much time is left
PATIENCE = 12  # times a part's seconds for a rehearsal: how fast a CPU is, is not what it is about
SHOWN_LINES = 15  # of what a failed command said
GRACE_SECONDS = 5.0  # between asking a command to end and killing it


class Conductor:
    """Keeps what became of every part in ``visit.json``, so that a later visit goes on.

    Args:
        output: folder of the results and logs.
        rehearsal: whether figures are of tiny sizes on a CPU.
        resume: whether to go on from an earlier visit's file.

    Raises:
        ConfigError: the earlier visit was to another card, or is a rehearsal.
    """

    def __init__(self, output: Path, rehearsal: bool, resume: bool) -> None:
        self.output, self.rehearsal = output, rehearsal
        self.file = output / "visit.json"
        here = machine("cpu" if rehearsal else "cuda") if rehearsal or _cuda() else {"gpu": None}
        self.state: dict[str, Any] = {"benchmark": "gpu", "rehearsal": rehearsal, "machine": here, "parts": {}}
        if not resume or not self.file.exists():
            return
        earlier = json.loads(self.file.read_text(encoding="utf-8"))
        if (earlier["rehearsal"], earlier["machine"]["gpu"]) != (rehearsal, here["gpu"]):
            place = "a rehearsal" if earlier["rehearsal"] else earlier["machine"]["gpu"]
            raise ConfigError(
                f"--resume: {self.file} is of {place}, this is {here['gpu'] or 'a rehearsal'}; give another --output"
            )
        self.state["parts"] = earlier["parts"]

    def run(self, parts: Sequence[Part], options: argparse.Namespace) -> dict[str, Any]:
        """Run the parts that have not passed yet, as long as time is left; returns the state."""
        end = time.monotonic() + 60 * options.minutes
        (self.output / "logs").mkdir(parents=True, exist_ok=True)
        for part in parts:
            if self._status(part) in DONE:
                continue
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                print(f"== {part.name}: left for --resume", flush=True)
                continue
            seconds = min(part.seconds * (PATIENCE if self.rehearsal else 1), left)
            known = self._status(part) is not None
            visit = Visit(self.output, self.rehearsal, seconds, known, options.photos, options.cifar, options.tests)
            print(f"== {part.name}: {part.question} ({seconds:.0f} s at most)", flush=True)
            began = time.monotonic()
            codes = self._run_part(part, visit)
            self.state["parts"][part.name] = {
                "status": _status_of(codes, part.idle),
                "codes": codes,
                "seconds": round(time.monotonic() - began, 1),
            }
            write_atomically(self.file, json.dumps(self.state, indent=2) + "\n")
            print(f"== {part.name}: {self._status(part)} after {time.monotonic() - began:.0f} s", flush=True)
        return self.state

    def exit_code(self, parts: Sequence[Part]) -> int:
        """Return 0 where all have passed, 75 where some are left, 1 where one failed."""
        found = {self._status(part) for part in parts}
        # Limits are for the sizes that people train.
        good = set(DONE) if self.rehearsal else {"passed"}
        return 0 if found <= good else LEFT if found <= good | {"partly", "stopped", None} else 1

    def _status(self, part: Part) -> str | None:
        return self.state["parts"].get(part.name, {}).get("status")

    def _run_part(self, part: Part, visit: Visit) -> list[int | None]:
        """Run a part's commands in its time; returns their exit codes, None for what was stopped or not begun.

        A benchmark ends with 1 where a limit does not hold, and has written its page then: that is LIMIT.
        """
        end = time.monotonic() + visit.seconds
        logs = self.output / "logs"
        commands = [
            _Command(words, logs / f"{part.name}_{number}.log", {"DS_ACCELERATOR": "cpu"} if self.rehearsal else {})
            for number, words in enumerate(part.commands(visit), start=1)
        ]
        codes = []
        try:
            for command in commands if part.together else ():
                command.start()
            for command in commands:
                began = time.time()
                if end > time.monotonic():
                    command.start()
                    code = command.wait(end - time.monotonic())
                    written = [file for file in self.output.glob("*.md") if file.stat().st_mtime >= began]
                    codes.append(LIMIT if code == 1 and written else code)
                else:
                    codes.append(command.code() if part.together else None)
        finally:  # also on Ctrl-C: nothing may stay on the device
            for command in commands:
                command.end()
        return codes


class _Command:
    """Words behind this Python, run in a session of their own, what they say in a file of their own."""

    def __init__(self, words: list[str], log: Path, environment: dict[str, str]) -> None:
        self.words, self.log, self.environment = words, log, environment
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, if it is not yet."""
        if self._process is not None:
            return
        path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": os.pathsep.join(path), **self.environment}
        with self.log.open("w", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(['python3', *self.words])}\n")
            log.flush()
            self._process = subprocess.Popen(
                [sys.executable, *self.words], cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float) -> int | None:
        """Return its exit code, None where it takes longer, and print the end of what a failed one said."""
        assert self._process is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        code = self.code()
        self.end()
        if code not in (0, LEFT):
            outcome = "was stopped at its time limit" if code is None else f"ended with {code}"
            print(f"   {shlex.join(self.words)} {outcome}; the end of {self.log.name}:", flush=True)
            said = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(f"   | {line[:200]}" for line in said[-SHOWN_LINES:]), flush=True)
        return code

    def code(self) -> int | None:
        """Return its exit code, None as long as it runs and before."""
        return None if self._process is None else self._process.poll()

    def end(self) -> None:
        """End it with all that it started, its session."""
        if self._process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            with suppress(subprocess.TimeoutExpired):  # what outlives it is killed
                self._process.wait(GRACE_SECONDS)


def _status_of(codes: Sequence[int | None], idle: int | None) -> str:
    worked = [code for code in codes if code is None or code != idle]
    if not worked or any(code not in (0, LEFT, LIMIT, None) for code in worked):
        return "failed"
    return "stopped" if None in worked else "partly" if LEFT in worked else DONE[LIMIT in worked]


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
