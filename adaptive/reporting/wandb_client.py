"""The W&B client's own process: reads commands from its standard input (a socket), answers on it.

``dashboard.py`` starts this file as a script, so it imports nothing of Adaptive (and no torch). One JSON object per
line, commands ``init``, ``log``, ``summary``, ``image``, ``finish``; answers ``ready``, ``finished``, ``error``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from wandb import Run

OUTLIVED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def serve(commands: TextIO, answers: TextIO) -> None:
    """Carry out commands until ``finish`` or the end of the trainer, which counts as a failed run."""

    def answer(kind: str, content: Any) -> None:
        answers.write(json.dumps({kind: content}) + "\n")
        answers.flush()

    run: Run | None = None
    limit = 60.0
    try:
        for line in commands:
            [(command, content)] = json.loads(line).items()
            if command == "init":
                limit = content["limit"]
                run = _init(content)
                answer("ready", str(Path(run.dir).parent))
            elif run is not None and command == "finish":
                run.finish(exit_code=content)
                answer("finished", content)
                return
            elif run is not None:
                _pass_on(run, command, content)
    except Exception as error:
        answer("error", f"{type(error).__name__}: {error}")
        return
    if run is not None:
        signal.setitimer(signal.ITIMER_REAL, limit)
        run.finish(exit_code=1)


def _init(content: dict[str, Any]) -> Run:
    import wandb

    run = wandb.init(
        **content["run"],
        settings=wandb.Settings(
            # Shorter than the trainer waits, so that the cause of a failure arrives there before its own time limit.
            login_timeout=0.2 * content["limit"],
            init_timeout=0.4 * content["limit"],
            console="off",
            program=content["program"],
            x_stats_pid=content["pid"],
        ),
    )
    # W&B's own counter rises with every call and knows no resuming; the records' step is the axis.
    run.define_metric("step")
    for group in ("train/*", "val/*", "val_ema/*", "epoch", "samples"):
        run.define_metric(group, step_metric="step")
    return run


def _pass_on(run: Run, command: str, content: Any) -> None:
    import wandb

    if command == "log":
        run.log(content)
    elif command == "summary":
        run.summary.update(content)
    elif command == "image":
        run.log({content["key"]: wandb.Image(content["path"])})
    else:
        raise ValueError(f"unknown command {command!r}")


def main() -> None:
    """Run as a script: commands on file descriptor 0."""
    # The scheduler's warnings and Ctrl+C are for the trainer, which ends this process by a command.
    for number in OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
    # This file's folder comes first on the path of a script and would shadow other packages' modules.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]
    with socket.socket(fileno=os.dup(0)) as link:
        serve(link.makefile("r", encoding="utf-8"), link.makefile("w", encoding="utf-8"))


if __name__ == "__main__":
    main()
