"""The decision whether a Slurm job that ended is requeued, and the limit of starts that bring no progress.

The batch scripts (slurm/lib.sh) run this module before and after every start of a run. It records starts and ends in
``requeues.jsonl`` in the run folder, and needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaptive import standard_streams
from adaptive.config.loading import load_config
from adaptive.config.saved import write_config
from adaptive.config.sections import Config
from adaptive.distributed.ranks import free_port_of_job
from adaptive.errors import (
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_PASSING,
    EXIT_PEER,
    AdaptiveError,
    ConfigError,
    MachineError,
    TrainingError,
)
from adaptive.foreign_text import say
from adaptive.jobs.code_version import check_frozen_code
from adaptive.jobs.submission import seconds
from adaptive.passing_faults import exit_code_of, passing, told
from adaptive.training.checkpoints.checkpoint_manifest import newest_step

MAX_STALLED = 3
SHORT = 1200  # seconds; time limits below it need a signal that comes closer to the end than 300 seconds
HISTORY = "requeues.jsonl"
RESULTS = "ADAPTIVE_RESULTS"  # names the folder in which ranks leave their exit codes

# Exit codes that say what was decided.
DECIDED = {"done": 10, "requeue": 11, "stop": 12}

History = list[dict[str, Any]]


def leave_exit_code(code: int) -> None:
    """Write this rank's exit code where the batch script looks for it: rank 0's always, others' if they failed."""
    folder, rank = os.environ.get(RESULTS), os.environ.get("SLURM_PROCID", "0")
    if folder and (code or rank == "0"):
        with suppress(OSError):
            Path(folder, f"rank-{rank}").write_text(f"{code}\n")


def outcome(results: dict[int, int], launcher: int, asked: bool) -> int:
    """Return the exit code of a whole start, from those of its ranks.

    Args:
        results: exit codes that ranks left. A rank that was killed left none.
        launcher: srun's exit code. It is the highest of all tasks', those included that srun killed after a failure.
        asked: whether the batch script was signalled.
    """
    if launcher == 0 or results.get(0) == 0:
        return 0
    codes = sorted(results.values())
    if EXIT_INTERRUPTED in codes:
        return EXIT_INTERRUPTED
    own_faults = [code for code in codes if code and not worth_another_try(code)]
    if own_faults:
        return own_faults[0]
    if asked:
        return EXIT_INTERRUPTED
    return codes[-1] if codes else launcher


def worth_another_try(code: int) -> bool:
    """Say whether another start may end differently.

    This one was stopped, hung, lost a rank, met a fault that passes, or was killed.
    """
    return code in (EXIT_INTERRUPTED, EXIT_HUNG, EXIT_PEER, EXIT_PASSING) or code >= 128


def stalled(history: History, job: str, step: int) -> int:
    """Count a job's last starts in a row that began at ``step`` or beyond: they brought no newer checkpoint.

    Starts before the job was stopped for this reason, and started again by a human, do not count.
    """
    count = 0
    for entry in reversed([entry for entry in history if entry.get("job") == job]):
        if entry.get("decision") == "stop":
            break
        if entry.get("event") == "start" and (began := _number(entry, "step")) is not None:
            if began < step:
                break
            count += 1
    return count


def cut_short(history: History, job: str) -> int:
    """Count a job's last starts in a row that were asked to stop long before its short time limit."""
    count = 0
    for entry in reversed([e for e in history if e.get("job") == job and e.get("event") == "end"]):
        if entry.get("decision") == "stop" or not entry.get("cut_short"):
            break
        count += 1
    return count


def without_note(history: History, job: str, restart: int) -> int:
    """Count a job's last starts in a row, up to ``restart``, that the history does not know: no room was for a note."""
    known = {_number(entry, "restart") for entry in history if entry.get("job") == job}
    return next(count for count in range(restart + 2) if restart - count in known or count > restart)


def _number(entry: Mapping[str, Any], key: str) -> int | None:
    found = entry.get(key)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def read_history(folder: Path) -> History:
    """Return the entries of requeues.jsonl; what a full disk or a crash cut off, and what is none, is left out."""
    text = ""
    try:
        text = (folder / HISTORY).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        pass
    except OSError as error:
        say(
            f"{folder / HISTORY} cannot be read: {error.strerror}; starts without progress are not all known",
            file=sys.stderr,
        )
    entries = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            entries += [entry] if isinstance(entry, dict) else []
    return entries


def begin(words: Sequence[str], seed: int | None, group: str | None) -> list[str]:
    """Record a start; return the run folder, the folder for ranks' exit codes, and the words to train with.

    Raises:
        ConfigError: the configuration or an override is wrong.
        MachineError: the run folder cannot be written.
        TrainingError: too many starts in a row brought no progress.
    """
    config = load_config(words[0], words[1:])
    if seed is not None:
        config = of_seed(config, seed, group)
    folder = Path(str(config.train.run_folder))
    results = folder / ".slurm" / f"{_job()}-{_restart()}"
    try:
        for old in results.parent.glob(f"{_job()}-*"):
            shutil.rmtree(old)
        results.mkdir(parents=True)
        if seed is not None:
            words = [str(folder / ".slurm" / "config.yaml")]
            write_config(config, Path(words[0]))
    except OSError as error:
        raise MachineError(
            f"train.run_folder = {str(folder)!r} cannot be written: {error.strerror}; choose another folder"
        ) from None
    history = read_history(folder)
    step = _newest_step(folder, history)
    count = stalled(history, _job(), step) + without_note(history, _job(), _restart() - 1)
    if _restart() and count >= _limit():
        reason = _without_progress(count, step)
        _note(folder, event="refused", step=step, decision="stop", reason=reason)
        raise TrainingError(f"{folder}: {reason}")
    _note(folder, event="start", step=step, nodes=os.environ.get("SLURM_JOB_NODELIST", ""))
    return [str(folder), str(results), *words]


def of_seed(config: Config, seed: int, group: str | None) -> Config:
    """Return the configuration of one seed of several: with a run folder of its own, in a W&B group with the others."""
    folder = Path(str(config.train.run_folder)) / f"seed-{seed}"
    train = config.train.model_copy(update={"seed": seed, "run_folder": str(folder)})
    tracking = config.tracking.model_copy(update={"group": config.tracking.group or group})
    return config.model_copy(update={"train": train, "tracking": tracking})


def end(folder: Path, launcher: int, asked: bool, after: int = 0, limit: int | None = None) -> tuple[str, int]:
    """Record an end; return ``done``, ``requeue`` or ``stop``, and the exit code of the start.

    What cannot be read or written, on a full disk say, changes no decision but by what it would have said.

    Args:
        folder: of the run.
        launcher: srun's exit code.
        asked: whether the batch script was signalled.
        after: seconds from the job's start to that signal.
        limit: the job's time limit in seconds, if it is known and there is one.
    """
    results: dict[int, int] = {}
    with suppress(OSError):
        for file in (folder / ".slurm" / f"{_job()}-{_restart()}").glob("rank-*"):
            with suppress(ValueError, OSError):
                results[int(file.name.removeprefix("rank-"))] = int(file.read_text())
    code = outcome(results, launcher, asked)
    history = read_history(folder)
    step = _newest_step(folder, history)
    count = stalled(history, _job(), step) + without_note(history, _job(), _restart())
    # A preemption may come early; in a short time limit, again and again, it is the limit's own signal.
    early = bool(asked and limit and limit <= SHORT and 4 * after < limit)
    if code == 0:
        decision, reason = "done", "trained to the end"
    elif not worth_another_try(code):
        decision, reason = "stop", f"exit code {code} is an error that another start would meet again"
    elif count >= _limit():
        decision, reason = "stop", _without_progress(count, step)
    elif early:
        short = cut_short(history, _job()) + 1
        decision = "stop" if short >= _limit() else "requeue"
        reason = (
            f"asked to stop {after} s after the start, with a time limit of {limit} s ({short} starts in a row), at "
            f"step {step}; give a longer --time, or a signal closer to its end (--signal=B:USR1@{(limit or 0) // 4})"
        )
    else:
        decision, reason = "requeue", f"exit code {code} at step {step}"
    noted = {"cut_short": True} if early else {}
    _note(folder, event="end", exit_code=code, step=step, decision=decision, reason=reason, **noted)
    say(f"{decision}: {reason}", file=sys.stderr)
    return decision, code


def _without_progress(count: int, step: int) -> str:
    return (
        f"{count} starts in a row ended without a checkpoint beyond step {step}; mend the cause (the log says it), or "
        f"save more often (checkpoint.every_steps), or raise ADAPTIVE_MAX_STALLED = {_limit()}"
    )


def _newest_step(folder: Path, history: History) -> int:
    """Return the step of the newest checkpoint; where that cannot be seen, what the job's last start began with."""
    try:
        return newest_step(folder / "checkpoints")
    except OSError as error:
        say(f"{folder / 'checkpoints'} cannot be read: {error.strerror}", file=sys.stderr)
    steps = [_number(entry, "step") for entry in history if entry.get("job") == _job()]
    return next((step for step in reversed(steps) if step is not None), 0)


def _note(folder: Path, **entry: Any) -> None:
    """Add an entry to the history; nothing hangs on it, so a disk without room is told."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "job": _job(), "restart": _restart(), **entry})
    try:
        with (folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        say(f"{folder / HISTORY} cannot be written: {error.strerror}; goes on without this note", file=sys.stderr)


def _job() -> str:
    return os.environ.get("SLURM_JOB_ID", "0")


def _restart() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _limit() -> int:
    text = os.environ.get("ADAPTIVE_MAX_STALLED") or str(MAX_STALLED)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"ADAPTIVE_MAX_STALLED = {text!r}: give a number of starts, 1 or more")
    return int(text)


def main() -> int:
    """Entry point of the script; answers on standard output: words ended by NUL for begin, one line for end.

    The first word is the port where the ranks are to meet. Where the line for end cannot be written, the exit code is
    one of `DECIDED`.
    """
    standard_streams.prepare()
    parser = argparse.ArgumentParser(prog="requeue.py", description="Used by the batch scripts in slurm/.")
    actions = parser.add_subparsers(dest="action", required=True)
    starting = actions.add_parser("begin")
    starting.add_argument("--seed", type=int)
    starting.add_argument("--group")
    starting.add_argument("words", nargs="+", metavar="CONFIG [key=value]")
    ending = actions.add_parser("end")
    ending.add_argument("--code", type=int, required=True)
    ending.add_argument("--asked", action="store_true")
    ending.add_argument("--after", type=int, default=0)
    ending.add_argument("--limit", default="")
    ending.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    decision = None
    try:
        check_frozen_code()
        _limit()
        if arguments.action == "begin":
            words = begin(arguments.words, arguments.seed, arguments.group)
            port = os.environ.get("MASTER_PORT") or str(free_port_of_job(os.environ))
            for word in (port, *words):
                sys.stdout.write(f"{word}\0")
        else:
            limit = seconds(arguments.limit) if arguments.limit else None
            decision, code = end(arguments.folder, arguments.code, arguments.asked, arguments.after, limit)
            print(decision, code)
        standard_streams.finish()
    except (AdaptiveError, OSError) as error:
        if not isinstance(error, AdaptiveError) and not passing(error):
            raise
        say((error if isinstance(error, AdaptiveError) else told(error)).told("train"), file=sys.stderr)
        return DECIDED[decision] if decision else exit_code_of(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
