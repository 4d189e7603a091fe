"""Real training runs on several ranks that can be hurt at any moment.

A launcher of our own stands in for deepspeed's: it forks the ranks from a server that has imported the libraries, so
that a dozen lives cost a minute or two and not ten. What runs inside is ``adaptive train`` itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from adaptive.doctor.checks.network import free_port
from tests.helpers.ranks import fork_context, rank_environment
from tests.helpers.stacks import stacks
from tests.helpers.waiting import PATIENCE

END_WITHIN = 120  # seconds that a rank may take to end when its peer is dead and its launcher says so


class Life:
    """The ranks of one start of a run."""

    def __init__(
        self,
        config: Path,
        folder: Path,
        world: int = 2,
        *overrides: str,
        memory_gib: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # The log lies elsewhere: a full disk must not silence it.
        self.folder, self.log = folder, config.parent / f"{folder.parent.name}-{folder.name}.log"
        port = free_port()
        words = [str(config), f"train.run_folder={folder}", *overrides]
        context = fork_context()
        self.ranks = [
            context.Process(
                target=_train,
                args=(words, rank_environment(rank, world, port) | dict(environment or {}), str(self.log), memory_gib),
            )
            for rank in range(world)
        ]
        for process in self.ranks:
            process.start()

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """Return every rank's exit code (negative: the signal that killed it)."""
        until = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        if any(process.is_alive() for process in self.ranks):
            doing = stacks(self._processes())
            try:
                self.kill()
            finally:
                raise AssertionError(f"ranks still ran after {seconds} s:\n{self.tail()}\n{doing}")
        return [process.exitcode for process in self.ranks]

    def finish(self, seconds: float = PATIENCE) -> None:
        """Wait for a good end."""
        assert self.wait(seconds) == [0] * len(self.ranks), self.tail()

    def until(self, due: Callable[[], bool], seconds: float = PATIENCE) -> bool:
        """Wait for ``due``; False where the run ended before."""
        limit = time.monotonic() + seconds
        while not due():
            if not all(process.is_alive() for process in self.ranks):
                return False
            assert time.monotonic() < limit, self.tail()
            time.sleep(0.002)
        return True

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to some ranks (all without any given)."""
        for rank in ranks or range(len(self.ranks)):
            # One that has just ended is alive until the server has told of it.
            with contextlib.suppress(ProcessLookupError):
                if self.ranks[rank].is_alive():
                    os.kill(self.ranks[rank].pid, number)

    def kill(self, *ranks: int) -> None:
        """SIGKILL some ranks; then, as launchers do, SIGTERM the others, which have to end soon."""
        processes = self._processes()
        self.send(signal.SIGKILL, *ranks)
        time.sleep(0.1)
        self.send(signal.SIGTERM)
        until = time.monotonic() + END_WITHIN
        for process in self.ranks:
            process.join(max(0.0, until - time.monotonic()))
        hanging = [psutil.Process(process.pid) for process in self.ranks if process.is_alive()]
        doing = stacks(hanging)
        for process in self.ranks:
            process.kill()
            process.join()
        _, left = psutil.wait_procs(processes, timeout=END_WITHIN)
        left = [process for process in left if process.status() != psutil.STATUS_ZOMBIE]  # of nobody who would wait
        doing += stacks(left)
        for process in left:
            process.kill()
        assert not hanging, f"a rank did not end within {END_WITHIN} s of SIGTERM:\n{self.tail()}\n{doing}"
        assert not left, f"outlived their rank:\n{self.tail()}\n{doing}"

    def _processes(self) -> list[psutil.Process]:
        """The ranks that live, and their children."""
        found = []
        for rank in self.ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(rank.pid)
                found += [process, *process.children(recursive=True)]
        return found

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(errors="replace")[-20000:] if self.log.exists() else "(no log)"

    @property
    def step(self) -> int:
        """The last recorded step."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"]) if lines else 0
        except (OSError, ValueError):
            return 0

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.folder / "checkpoints").glob(".writing-*"))


def _train(words: list[str], environment: dict[str, str], log: str, memory_gib: float | None) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    # The server's process group is pytest's: without this the run would be a child of the server alone.
    os.setsid()
    from adaptive.commands.main import main

    if memory_gib is not None:
        # What the process has by now, and so much more.
        now = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (now + int(memory_gib * 2**30),) * 2)
    code: Any = 1
    try:
        main(["train", *words])
    except SystemExit as end:
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
