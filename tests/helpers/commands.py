"""Start the ``adaptive`` command: as users do, and forked from a process that has done the slow imports already."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.helpers.ranks import fork_context
from tests.helpers.waiting import PATIENCE

ADAPTIVE = str(Path(sys.executable).with_name("adaptive"))


@dataclass(frozen=True)
class Ended:
    code: int | None
    out: str
    err: str

    def error_line(self, command: str = "train") -> str:
        """The one line on stderr, of a command that failed as it should."""
        assert self.code == 1, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith(f"adaptive {command}: error: "), self.err
        return lines[0]


def start_command(words: list[str], seconds: float = PATIENCE, stdin: bytes = b"", **environment: str) -> Ended:
    """Start the real command in a process of its own."""
    ended = subprocess.run(
        [ADAPTIVE, *words],
        input=stdin,
        capture_output=True,
        timeout=seconds,
        check=False,
        env=os.environ | environment,
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Forks:
    """Runs commands in forks of one process; every fork has its own stdout, stderr and folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.context = fork_context()

    def start(
        self,
        words: list[str],
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        prepare: tuple[Callable[..., None], tuple[Any, ...]] | None = None,
        **variables: str,
    ) -> "Fork":
        """Start a command; ``prepare`` is a function that is called before with its arguments."""
        self.count += 1
        prefix = str(self.folder / str(self.count))
        process = self.context.Process(
            target=_call_main, args=(words, prefix, cwd, (environment or {}) | variables, prepare)
        )
        process.start()
        return Fork(process, prefix)

    def run(self, words: list[str], seconds: float = PATIENCE) -> Ended:
        return self.start(words).wait(seconds)


@dataclass(frozen=True)
class Fork:
    process: BaseProcess
    prefix: str

    def wait(self, seconds: float = PATIENCE) -> Ended:
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        out, err = (Path(f"{self.prefix}.{name}").read_text() for name in ("out", "err"))
        return Ended(self.process.exitcode, out, err)


def _call_main(
    words: list[str],
    prefix: str,
    cwd: Path | None,
    environment: dict[str, str],
    prepare: tuple[Callable[..., None], tuple[Any, ...]] | None,
) -> None:
    for name in RANK_VARIABLES:  # a test may have made its process a rank
        os.environ.pop(name, None)
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{prefix}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    if prepare is not None:
        prepare[0](*prepare[1])
    from adaptive.commands.main import main

    main(words)
