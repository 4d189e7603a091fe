"""What `adaptive submit` writes: the batch script, and the frozen configuration and code that the job runs."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import jinja2

from adaptive.config.saved import granted, write_config
from adaptive.config.sections import Config
from adaptive.errors import MachineError, UsageError, one_line
from adaptive.files import sync_folder, write_atomically
from adaptive.foreign_text import redacted, shell_words
from adaptive.jobs.code_version import batch_scripts, copy_code, write_code_version
from adaptive.locks import LockHeldError, workshop

MOST_SEEDS = 1000  # a configuration is written for each
SUBMITTING = ".submitting"  # in the run folder, while it is submitted
WARNING = 300  # seconds before the time limit at which the run is asked to save
EARLY, START = 60, 60  # seconds by which Slurm may be early, and in which no run gets to its first step
# Settings of the batch scripts that a job keeps as they were when it was submitted.
KEPT = tuple(
    f"ADAPTIVE_{n}" for n in ["MODULES", "SETUP", "CONTAINER", "SRUN", "STAGE", "MAX_STALLED", "GRACE", "REQUEUE"]
)
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<a>\d+)(?::(?P<b>\d+))?(?::(?P<c>\d+))?")

Options = list[tuple[str, str | None]]


@dataclass(frozen=True)
class Resources:
    """The resources of a job.

    ``memory`` is in bytes per node, None to leave it to Slurm; ``options`` are further ones by name, ``extra`` words
    for #SBATCH lines as they are.
    """

    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 1
    gpus: bool = True
    time: str | None = None
    name: str = "adaptive"
    requeue: bool = True
    seeds: str | None = None
    after: str | None = None
    memory: int | None = None
    options: tuple[tuple[str, str], ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node


def seconds(time: str) -> int | None:
    """Return a Slurm time limit in seconds, None without one (0, UNLIMITED, INFINITE).

    Raises:
        UsageError: it is none of Slurm's ways to write a time.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return None
    match = _TIME.fullmatch(time)
    if match is None:
        raise UsageError(f"--time {time!r} is no time of Slurm's; write 90 (minutes), 12:00:00 or 2-00:00:00")
    a, b, c = (int(match[name] or 0) for name in "abc")
    if match["d"]:
        return (int(match["d"]) * 24 + a) * 3600 + b * 60 + c
    if match["c"]:
        return a * 3600 + b * 60 + c
    return (a * 60 + b) or None


def check_time(resources: Resources) -> None:
    """Refuse a time limit so short that the job would be asked to stop before it has begun (raises UsageError)."""
    limit = seconds(resources.time) if resources.time is not None else None
    if limit is None or not resources.requeue:
        return
    lead, given = _lead(resources)
    if limit < lead + EARLY + START:
        least = lead + EARLY + START if given else (EARLY + START) * 4 // 3
        raise UsageError(
            f"--time {resources.time}: the signal to save comes {lead} s before the end{given}, and up to {EARLY} s "
            f"early: the job would be requeued before it has trained, again and again; give {math.ceil(least / 60)} "
            f"minutes or more{', or a later signal' if given else ', or --no-requeue'}"
        )


def _lead(resources: Resources) -> tuple[int, str]:
    """Return how many seconds before the time limit the signal comes, and the option that says so, if one does."""
    for option in reversed(resources.extra):
        if match := re.fullmatch(r"--signal[= ](?:[BR]+:)?\w+@(\d+)", option.strip()):
            return int(match[1]), f" (--sbatch-option={option.strip()})"
    limit = seconds(resources.time) if resources.time is not None else None
    return (WARNING if limit is None else max(1, min(WARNING, limit // 4))), ""


def seed_numbers(text: str) -> list[int]:
    """Return the seeds that Slurm would number an array's tasks with, from ``0-4``, ``1,5,9``, ``0-8:4``, ``0-9%2``.

    Raises:
        UsageError: it is none of these.
    """
    numbers: set[int] = set()
    listed, percent, at_once = text.partition("%")
    for part in listed.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9})(?::([1-9]\d{0,5}))?)?", part)
        found = range(int(match[1]), int(match[2] or match[1]) + 1, int(match[3] or 1)) if match else range(0)
        if not 0 < len(found) <= MOST_SEEDS or (percent and not re.fullmatch(r"[1-9]\d*", at_once)):
            raise UsageError(
                f"--seeds {text!r}: write 0-4, or 1,5,9 (up to {MOST_SEEDS}), with %2 behind it to run two at a time"
            )
        numbers.update(found)
    return sorted(numbers)


def render_training(config: Config, resources: Resources) -> str:
    """Return the batch script that trains what `freeze` wrote."""
    folder = _folder(config)
    frozen = folder / "submitted"
    if resources.seeds is None:
        words = [_shell(str(frozen / "config.yaml"))]
    else:
        words = [f'{_shell(str(frozen / "config-"))}"$SLURM_ARRAY_TASK_ID".yaml']
    options: Options = [
        *_resources(resources, resources.nodes, resources.ranks_per_node),
        *([("mem", f"{-(-resources.memory // 2**20)}M")] if resources.memory is not None else []),
        ("requeue" if resources.requeue else "no-requeue", None),
        ("open-mode", "append"),
        ("signal", f"B:USR1@{_lead(resources)[0]}"),
    ]
    if resources.after is not None:
        options.append(("dependency", f"afterok:{resources.after}"))
    variables = {} if resources.requeue else {"ADAPTIVE_REQUEUE": "0"}
    return _render(config, resources, "train", options, words, f"trains {folder}", variables)


def render_evaluation(config: Config, resources: Resources, job: str) -> str:
    """Return the batch script that measures the run after its training job."""
    folder = _folder(config)
    words = [_shell(str(folder))] if resources.seeds is None else [f'{_shell(f"{folder}/seed-")}"$SLURM_ARRAY_TASK_ID"']
    words += map(_shell, granted(config))  # this is the user's own configuration; the run folder's will not count
    options = [
        *_resources(resources, 1, 1, "-evaluate"),
        ("dependency", f"{'afterok' if resources.seeds is None else 'aftercorr'}:{job}"),
    ]
    return _render(config, resources, "evaluate", options, words, f"measures {folder}", {})


def _resources(resources: Resources, nodes: int, ranks: int, suffix: str = "") -> Options:
    options: Options = [
        ("job-name", resources.name + suffix),
        ("nodes", str(nodes)),
        ("ntasks-per-node", str(ranks)),
        ("cpus-per-task", str(resources.cpus_per_rank)),
    ]
    if resources.gpus:
        options.append(("gpus-per-node", str(ranks)))
    if resources.time is not None:
        options.append(("time", resources.time))
    if resources.seeds is not None:
        options.append(("array", resources.seeds))
    return [*options, *resources.options]


def _render(
    config: Config,
    resources: Resources,
    action: str,
    options: Options,
    words: Sequence[str],
    purpose: str,
    variables: dict[str, str],
) -> str:
    log = "slurm-%j.log" if resources.seeds is None else "slurm-%A-%a.log"
    folder = _folder(config)
    options = [*options, ("chdir", str(Path.cwd())), ("output", f"{str(folder).replace('%', '%%')}/{log}")]
    kept = {name: os.environ[name] for name in KEPT if os.environ.get(name)}
    if "ADAPTIVE_PYTHON" in os.environ or not kept.keys() & {"ADAPTIVE_CONTAINER", "ADAPTIVE_SRUN"}:
        kept["ADAPTIVE_PYTHON"] = os.environ.get("ADAPTIVE_PYTHON", sys.executable)
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"option": _option, "shell": _shell}
    return environment.from_string((batch_scripts() / "job.sbatch.j2").read_text(encoding="utf-8")).render(
        purpose=one_line(purpose),
        options=options,
        extra=[_plain(line, "--sbatch-option") for line in resources.extra],
        variables=({"ADAPTIVE_HOME": str(folder / "submitted" / "code")} | kept | variables).items(),
        action=action,
        words=words,
    )


@contextmanager
def submitting(folder: Path) -> Iterator[None]:
    """Keep a run folder from a second submission until this one is in the queue.

    Raises:
        MachineError: there is another, or the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            held.enter_context(workshop(folder / SUBMITTING))
        except LockHeldError as error:
            where = f" ({error.holder})" if error.holder else ""
            remedy = f"if it has gone, rm {shell_words(error.file)}" if error.silent else "wait for it to end"
            raise MachineError(
                f"train.run_folder = {str(folder)!r} is being submitted by another adaptive submit{where}; {remedy}"
            ) from None
        except OSError as error:
            raise MachineError(f"{folder} cannot be written: {error}; choose another train.run_folder") from None
        yield


def freeze(configs: dict[str, Config], folder: Path, script: str) -> Path:
    """Write configurations by file name, the code, and the script to a run folder; return the script's path.

    They are written aside, and take the place of an earlier submission's by a rename; call within `submitting`.

    Raises:
        MachineError: the folder cannot be written.
    """
    frozen, beside = folder / "submitted", folder / SUBMITTING
    new, replaced = beside / "new", beside / "replaced"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        _tidy(frozen, new, replaced)  # what a killed submission left
        try:
            new.mkdir()
            for name, config in configs.items():
                write_config(config, new / name)
            copy_code(new / "code")
            write_script(new / "job.sbatch", script)
            if frozen.exists():
                frozen.rename(replaced)
            new.rename(frozen)
            sync_folder(folder)
        finally:
            _tidy(frozen, new, replaced)
        write_code_version(folder)
    except (OSError, shutil.Error) as error:
        raise MachineError(f"{frozen} cannot be written: {error}; choose another train.run_folder") from None
    return frozen / "job.sbatch"


def _tidy(frozen: Path, new: Path, replaced: Path) -> None:
    """Remove what was not published, and what was replaced; what was replaced by nothing comes back."""
    if replaced.exists() and not frozen.exists():
        replaced.rename(frozen)
    for leftover in (new, replaced):
        shutil.rmtree(leftover, ignore_errors=True)


def memory_is_said(extra: Sequence[str]) -> bool:
    """Whether the user has told Slurm how much memory a job gets, by an option or one of sbatch's variables."""
    kinds = ("mem", "mem-per-cpu", "mem-per-gpu")
    given = {word.strip().removeprefix("--").partition("=")[0].partition(" ")[0] for word in extra}
    return not given.isdisjoint(kinds) or any(
        os.environ.get(f"SBATCH_MEM_PER_{kind}") for kind in ("NODE", "CPU", "GPU")
    )


def nodes_have_memory() -> bool:
    """Whether Slurm knows how much memory its nodes have; where it does not, a job that asks for some is refused."""
    try:
        found = slurm("sinfo", "--noheader", "--format=%m").split()
    except MachineError:
        return True  # no Slurm here: a script is shown
    return not found or any(word.rstrip("+") not in ("0", "1") for word in found)


def write_script(path: Path, script: str) -> None:
    """Write a batch script; one that keeps secrets, in ADAPTIVE_SETUP for example, is its owner's alone."""
    write_atomically(path, script, private=redacted(script) != script)


def slurm(*words: str) -> str:
    """Run a command of Slurm's and return what it prints.

    Raises:
        MachineError: it is not installed, or refuses, with its own words.
    """
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise MachineError(
            f"{words[0]} not found; submit on a machine of the cluster (--dry-run shows the script anywhere)"
        ) from None
    if done.returncode:
        told = " ".join(line.removeprefix(f"{words[0]}: ") for line in done.stderr.splitlines() if line.strip())
        raise MachineError(f"{words[0]} refused: {told or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def _folder(config: Config) -> Path:
    return Path(str(config.train.run_folder)).absolute()


def _plain(text: str, what: str) -> str:
    """Return text of one line without control characters (raises UsageError)."""
    if not text.isprintable():
        raise UsageError(f"{what}: {text!r} holds a line break or a control character, which a batch script cannot")
    return text


def _option(value: str) -> str:
    """Quote a value as sbatch reads it in #SBATCH lines."""
    text = _plain(value, "a value for sbatch")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shell(value: str) -> str:
    """Quote a value for bash (raises UsageError for one with control characters: nobody could read the script)."""
    return shlex.quote(_plain(value, "a path or setting in the batch script"))
