"""Checks a command as far as it goes without starting it: its program's own parser, its configuration, its ranks."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement

from adaptive.commands.main import COMMANDS, INTERMIXED, _parse_intermixed, build_parser
from adaptive.config.loading import load_config
from adaptive.data.images.transforms import Mixer
from adaptive.training.batch import batch_sizes
from benchmarks.suite import PARTS
from tests.helpers.locations import REPOSITORY

OWN_FILES = {"digits.yaml", "photos.py", "classify.py"}  # which the tutorial has saved before
SLOTS = 8  # of a node in the page's HOSTS


def check(words: list[str], ranks: int = 1) -> None:
    """Check a command on so many ranks (AssertionError, SystemExit or an AdaptiveError where it would fail)."""
    program, *rest = words
    assert program in CHECKERS, f"unknown program {program}"
    if ">" in rest:
        assert (REPOSITORY / rest[-1]).is_file(), rest
        rest = rest[: rest.index(">")]
    CHECKERS[program](rest, ranks)


def check_mention(words: list[str]) -> None:
    """Check what running text says of a command: as a whole, or its flags where it leaves words out."""
    try:
        check(words)
    except SystemExit as ended:
        if not ended.code:
            return
        assert words[0] == "adaptive", words
        parser = argparse.ArgumentParser()
        importlib.import_module(f"adaptive.commands.{words[1]}").add_arguments(parser)
        flags = [word.partition("=")[0] for word in words[2:] if word.startswith("--")]
        assert [flag for flag in flags if flag not in parser._option_string_actions] == []


def script(text: str) -> None:
    """Let bash read a script of several lines, and look for the folders that it names."""
    assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
    assert [path for path in re.findall(r"tests/\S+?(?=[ \"])", text) if not (REPOSITORY / path).exists()] == []


def check_config(path: str, overrides: list[str], ranks: int) -> None:
    """Load a configuration and share its batch out as a run on so many ranks would."""
    if path in OWN_FILES:
        return
    assert path.startswith("configs/"), path
    config = load_config(REPOSITORY / path, overrides)
    batch = batch_sizes(config, ranks)
    assert batch.share > 1, f"{ranks} ranks with an image each"
    Mixer(config.data, 10, batch.micro_batch)


def adaptive(words: list[str], ranks: int) -> None:
    command, *rest = words
    if command.startswith("-"):
        build_parser(None).parse_args(words)
        return
    assert command in COMMANDS, command
    parsed = _parse_intermixed(command, rest) if command in INTERMIXED else build_parser(command).parse_args(words)
    if command == "train" and parsed.config is not None:
        check_config(parsed.config, parsed.overrides, ranks)
    if command in ("plan", "submit"):
        per_node = parsed.gpus_per_node or getattr(parsed, "ranks_per_node", None) or 1
        check_config(parsed.config, parsed.overrides, (parsed.nodes or 1) * per_node)


def python(words: list[str], ranks: int) -> None:
    words = [word for word in words if word != "-P"]
    match words:
        case ["-m", "adaptive", *rest]:
            adaptive(rest, ranks)
        case ["-m", module, *_]:
            assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), module
        case ["-c", code]:
            compile(code, "-c", "exec")
        case [script, *rest]:
            _script(script, rest, ranks)


def _script(script: str, words: list[str], ranks: int) -> None:
    if script in OWN_FILES:
        return
    assert (REPOSITORY / script).is_file(), script
    if script.startswith("benchmarks/"):
        module = importlib.import_module(f"benchmarks.{Path(script).stem}")
        if hasattr(module, "parser") or hasattr(module, "parse"):
            assert module.parser().parse_args(words) if hasattr(module, "parser") else module.parse(words)
        else:
            assert not words, words
    elif script.startswith("launcher/"):
        adaptive([Path(script).stem, *words], ranks)
    else:
        assert not words, words


def torchrun(words: list[str], ranks: int) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(words)
    ranks = int(parsed.nnodes.split(":")[-1]) * int(parsed.nproc_per_node)
    inner = [parsed.training_script, *parsed.training_script_args]
    python(["-m", *inner] if parsed.module else inner, ranks)


def deepspeed(words: list[str], ranks: int) -> None:
    from deepspeed.launcher.runner import parse_args

    parsed = parse_args(words)
    nodes = parsed.num_nodes if parsed.num_nodes > 0 else 2 if "--hostfile" in words else 1
    ranks = nodes * (parsed.num_gpus if parsed.num_gpus > 0 else SLOTS)
    inner = [parsed.user_script, *parsed.user_args]
    python(["-m", *inner] if parsed.module else inner, ranks)


@cache
def _known_options(program: str) -> str:
    """What the program says of its options; empty where it is not installed."""
    return subprocess.run([program, "--help"], capture_output=True, text=True).stdout if shutil.which(program) else ""


def slurm(program: str, words: list[str]) -> tuple[int, list[str]]:
    """Return tasks and what is started: all words behind the options, which have to be the program's own."""
    parser = argparse.ArgumentParser(program, allow_abbrev=False)
    for option in ("nodes", "ntasks-per-node", "gpus-per-node"):
        parser.add_argument(f"--{option}", type=int, default=1)
    for option in ("time", "array", "dependency", "signal", "comment", "mem"):
        parser.add_argument(f"--{option}")
    parser.add_argument("started", nargs=argparse.REMAINDER)
    parsed = parser.parse_args(words)
    options = [word.partition("=")[0] for word in words if word.startswith("--") and word not in parsed.started]
    known = _known_options(program)
    assert [option for option in options if known and f"{option}=" not in known] == []
    if program == "sbatch" and "--gpus-per-node" in options and "--ntasks-per-node" in options:
        assert parsed.gpus_per_node == parsed.ntasks_per_node, "one task per GPU"
    return parsed.nodes * parsed.ntasks_per_node, parsed.started


def sbatch(words: list[str], ranks: int) -> None:
    ranks, (script, *rest) = slurm("sbatch", words)
    assert (REPOSITORY / script).is_file(), script
    match Path(script).stem:
        case "train" | "array":
            adaptive(["train", *rest], ranks)
        case "evaluate":
            adaptive(["evaluate", *rest], ranks)
        case "sweep":
            assert re.fullmatch(r"\w+/\w+/\w+", *rest)


def srun(words: list[str], ranks: int) -> None:
    ranks, started = slurm("srun", words)
    check(started, ranks)


def mpirun(words: list[str], ranks: int) -> None:
    while words[0] == "-x":
        assert re.fullmatch(r"[A-Z_]+=\S+", words[1]), words[1]
        words = words[2:]
    check(words, SLOTS)


def make(words: list[str], ranks: int) -> None:
    """Ask make what it would do, and the benchmarks' parsers about what it passes on."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    ended = subprocess.run(["make", "-n", *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    passed = dict(word.split("=", 1) for word in words if "=" in word)
    if words[0] == "gpu":
        _script("benchmarks/gpu.py", shlex.split(passed.get("ARGS", "")), ranks)
    if words[0] == "bench" and "PARTS" in passed:
        assert set(passed["PARTS"].split()) <= set(PARTS), f"no such part; some of {', '.join(PARTS)}"
    makefile = (REPOSITORY / "Makefile").read_text()
    assert [name for name in passed if f"$({name})" not in makefile] == []


def pip(words: list[str], ranks: int) -> None:
    if words[0] == "uninstall":
        assert words[1:] == ["-y", "adaptive"], words  # PyPI's other package
        return
    assert words[0] == "install"
    for word in words[1:]:
        if not word.startswith("-"):
            requirement = Requirement(re.sub(r"^\.", "adaptive-training", word))
            extras = (REPOSITORY / "setup.py").read_text()
            assert all(f'"{extra}": [' in extras for extra in requirement.extras), word


def wandb(words: list[str], ranks: int) -> None:
    from wandb.cli.cli import cli

    command, *rest = words
    cli.commands[command].make_context(command, list(rest))
    if command == "sweep":
        assert (REPOSITORY / rest[-1]).is_file(), rest


CHECKERS = {
    "adaptive": adaptive, "python": python, "python3": python, "torchrun": torchrun, "deepspeed": deepspeed,
    "sbatch": sbatch, "srun": srun, "mpirun": mpirun, "make": make, "pip": pip, "wandb": wandb,
}  # fmt: skip
