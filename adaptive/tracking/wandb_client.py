"""The W&B client's own process: reads commands from its standard input (a socket), answers on it.

``dashboard.py`` starts this file as a script, so it imports nothing of Adaptive (and no torch). One JSON object per
line, commands ``init``, ``log``, ``summary``, ``image``, ``table``, ``lines``, ``checkpoint``, ``alert``, ``finish``;
answers ``ready``, ``finished``, ``error``.
"""

from __future__ import annotations

import contextlib
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


class History:
    """Writes a run's records to W&B, whose own step counter follows theirs and accepts nothing for a past step.

    Records of one step share a row. A continued run begins after its last row on the server: a record that is still
    missing in that row, of its validation say, gets the next number. Charts use `step` as axis, which is unchanged.

    ``file`` stores for later starts how far this one came: the last step, and the keys of each of its records.
    """

    def __init__(self, run: Run, file: Path) -> None:
        self.run, self.last, self.open_from = run, 0, run.starting_step
        self.file = file
        try:
            self.shown = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            self.shown = {"step": run.starting_step - 1, "records": []}

    def record(self, content: dict[str, Any]) -> None:
        """Write a record at its own step."""
        self.last = max(content["step"], self.open_from)
        late = self.last > content["step"]
        self.run.log(content, step=self.last, commit=late)
        if late:
            self.open_from = self.last + 1
        self._note(content)

    def _note(self, content: dict[str, Any]) -> None:
        if content["step"] > self.shown["step"]:
            self.shown = {"step": content["step"], "records": []}
        if content["step"] == self.shown["step"]:
            self.shown["records"].append(list(content))
        temporary = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # on a full disk the next start sends a few records twice
            temporary.write_text(json.dumps(self.shown), encoding="utf-8")
            temporary.replace(self.file)

    def between(self, content: dict[str, Any]) -> None:
        """Write something without a step, such as a picture, after all that came before."""
        self.last = max(self.last, self.open_from)
        self.run.log(content, step=self.last, commit=True)
        self.open_from = self.last + 1


def serve(commands: TextIO, answers: TextIO) -> None:
    """Carry out commands until ``finish``, or until the trainer has gone, which counts as a failed run."""

    def answer(kind: str, content: Any) -> None:
        answers.write(json.dumps({kind: content}) + "\n")
        answers.flush()

    run: Run | None = None
    history: History | None = None
    limit, alerts = 60.0, False
    try:
        for line in commands:
            [(command, content)] = json.loads(line).items()
            if command == "init":
                limit, alerts = content["limit"], content["alerts"]
                run = _init(content)
                history = History(run, Path(content["run"]["dir"]) / "wandb" / "shown.json")
                answer("ready", {"folder": str(Path(run.dir).parent), **history.shown})
            elif run is not None and command == "finish":
                if content["preempted"]:
                    run.mark_preempting()
                run.finish(exit_code=content["exit_code"])
                answer("finished", content)
                return
            elif history is not None:
                _pass_on(history, command, content)
    except Exception as error:
        answer("error", f"{type(error).__name__}: {error}")
        return
    if run is not None:
        signal.setitimer(signal.ITIMER_REAL, limit)
        if alerts:
            run.alert("the run ended without a word", "It was killed, or ended because it hung; its log says more.")
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
            x_transaction_log_flush_interval=1.0,  # its 15 s of records are lost where a whole job is killed at once
        ),
    )
    # The records' step is the axis, also of what is logged between two of them.
    run.define_metric("step")
    for group in ("train/*", "val/*", "val_ema/*", "checkpoint/*", "system/*", "ranks/*", "epoch", "samples"):
        run.define_metric(group, step_metric="step")
    return run


def _pass_on(history: History, command: str, content: Any) -> None:
    import wandb

    run = history.run
    if command == "log":
        history.record(content)
    elif command == "summary":
        run.summary.update(content)
    elif command == "image":
        history.between({content["key"]: wandb.Image(content["path"])})
    elif command == "table":
        rows = [[_cell(cell) for cell in row] for row in content["rows"]]
        history.between({content["key"]: wandb.Table(columns=content["columns"], data=rows)})
    elif command == "lines":
        columns = [list(zip(*points, strict=True)) for points in content["lines"].values()]
        chart = wandb.plot.line_series(
            xs=[list(x) for x, _ in columns],
            ys=[list(y) for _, y in columns],
            keys=list(content["lines"]),
            title=content["title"],
            xname=content["x_name"],
        )
        history.between({content["key"]: chart})
    elif command == "checkpoint":
        _refer_to(run, Path(content["path"]), content["about"], content["aliases"])
    elif command == "alert":
        run.alert(content["title"], content["text"], level=content["level"])
    else:
        raise ValueError(f"unknown command {command!r}")


def _refer_to(run: Run, path: Path, about: dict[str, Any], aliases: list[str]) -> None:
    import wandb

    model = wandb.Artifact(f"{run.id}-checkpoint", type="model", metadata={**about, "path": str(path)})
    try:
        # Without W&B's own checksum, for which it would read all of it; its manifest.json has better ones.
        model.add_reference(f"file://{path}", name=path.name, checksum=False)
    except (OSError, ValueError):
        if path.is_dir():
            raise
        return  # it had to make room for later ones meanwhile
    run.log_artifact(model, aliases=aliases)


def _cell(value: Any) -> Any:
    import wandb

    return wandb.Image(value["image"]) if isinstance(value, dict) else value


def entities(records: dict[str, list[str]]) -> dict[str, list[str]]:
    """Return the users or teams that records in W&B's protocol (base64) name, by run folder."""
    from base64 import b64decode

    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made when it is imported

    found: dict[str, list[str]] = {}
    for run, texts in records.items():
        named = {Record.FromString(b64decode(text)).run.entity for text in texts}
        found[run] = sorted(named - {""})
    return found


def main() -> None:
    """Run as a script: commands on file descriptor 0; with the word ``entities`` records there, and one answer."""
    if sys.argv[1:] == ["entities"]:
        json.dump(entities(json.load(sys.stdin)), sys.stdout)
        return
    # The scheduler's warnings and Ctrl+C are for the trainer, which ends this process by a command.
    for number in OUTLIVED:
        signal.signal(number, signal.SIG_IGN)
    # A script's folder comes first on sys.path, where its modules would shadow those of other packages.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).parent.resolve()]
    with socket.socket(fileno=os.dup(0)) as link:
        serve(link.makefile("r", encoding="utf-8"), link.makefile("w", encoding="utf-8"))


if __name__ == "__main__":
    main()
