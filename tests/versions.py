"""The smoke part of the tests with other versions: python -m tests.versions oldest newest

Numerics, data, a training on two ranks and export (the files of SMOKE), every pair in an environment of its own in
--folder, which is kept for the next time. --list prints what can be asked for, --prepare fetches the torches alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from adaptive.doctor.torch_versions import TRIED, TriedPair
from adaptive.errors import AdaptiveError, MachineError, UsageError

REPOSITORY = Path(__file__).resolve().parents[1]
OTHERS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "scipy")  # beside the extras, for the tests
SMOKE = (
    "networks/test_equilibrium.py",
    "networks/test_network.py",
    "networks/test_families.py",
    "networks/multiscale/test_multi_exit.py",
    "training/losses",
    "training/test_optimizer.py",
    "training/engine/test_parity.py",
    "training/test_trainer.py::test_a_run_stopped_in_either_phase_ends_bit_for_bit_the_same",
    "training/test_trainer.py::test_a_compiled_run_is_one_graph_and_equals_the_plain_one",
    "data/images",
    "data/reading",
    "end_to_end/test_evaluate.py",
    "inference/test_runner.py",
    "inference/acceleration",
    "inference/export",
    "doctor/test_torch_versions.py",
)
GROUPS = {
    "oldest": [TRIED[0]],
    "newest": [pair for pair in TRIED if pair.torch == TRIED[-1].torch],
    "all": list(TRIED),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Test the chosen pairs one after another; the exit code is 1 where one failed."""
    options = parser().parse_args(arguments)
    if options.list:
        print("\n".join(_name(pair) for pair in TRIED))
        return 0
    try:
        pairs = chosen(options.pairs)
        interpreters = {pair: interpreter(pair.python) for pair in pairs}
        if options.prepare:
            for pair in pairs:
                _install_torch(pair, interpreters[pair], options.folder.resolve() / _name(pair))
            return 0
        outcomes = {pair: _try(pair, interpreters[pair], options) for pair in pairs}
    except AdaptiveError as error:
        print(f"versions: {error}", file=sys.stderr)
        return 1
    for pair, code in outcomes.items():
        print(f"{_name(pair)}: {'passed' if code == 0 else f'FAILED (pytest ended with {code})'}")
    return int(any(outcomes.values()))


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    p = argparse.ArgumentParser(prog="python -m tests.versions", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("pairs", nargs="*", default=["oldest", "newest"], help="oldest, newest, all, or names from --list")
    p.add_argument("--folder", type=Path, default=REPOSITORY / ".venv-versions", help="of the environments")
    p.add_argument("--workers", default="2", help="test processes at a time (%(default)s)")
    p.add_argument("--prepare", action="store_true", help="fetch torch for each pair, and test nothing")
    p.add_argument("--list", action="store_true", help="print the names of all pairs and stop")
    return p


def chosen(names: Sequence[str]) -> list[TriedPair]:
    """Return the pairs that are asked for, each once (raises UsageError)."""
    known = {_name(pair): [pair] for pair in TRIED} | GROUPS
    for name in names:
        if name not in known:
            raise UsageError(f"{name}: no such pair; take oldest, newest, all, or some of {', '.join(known)}")
    return list(dict.fromkeys(pair for name in names for pair in known[name]))


def interpreter(version: str) -> str:
    """Return a Python of a version, 3.12: from PATH or from pyenv's versions (raises MachineError)."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"versions/{version}*/bin/python"))]
    for program in filter(None, found):
        # pyenv's shims are on PATH for versions that are installed, but not switched on.
        if subprocess.run([program, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            return str(program)
    raise MachineError(f"no Python {version} on PATH or among pyenv's versions; install it, or leave its pairs out")


def _try(pair: TriedPair, python: str, options: argparse.Namespace) -> int:
    environment = options.folder.resolve() / _name(pair)
    print(f"== {_name(pair)}", flush=True)
    _install(pair, python, environment)
    settings = {
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "TORCH_EXTENSIONS_DIR": str(environment / "torch_extensions"),
        "OMP_NUM_THREADS": "1",
    }
    words = ["-m", "not full", "-n", options.workers, "--dist", "loadfile", "-q"]
    command = [str(environment / "bin" / "python"), "-m", "pytest", *words, *(f"tests/{file}" for file in SMOKE)]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | settings, check=False).returncode


def _install(pair: TriedPair, python: str, environment: Path) -> None:
    """Make an environment with this pair and otherwise the versions of constraints.txt, unless it is there."""
    if _is_there(pair, environment / "made_of"):
        return
    _install_torch(pair, python, environment)
    _run([*_pip(environment), "--editable", ".[digits,export]", *OTHERS])
    (environment / "made_of").write_text(_made_of(pair), encoding="utf-8")


def _install_torch(pair: TriedPair, python: str, environment: Path) -> None:
    """Begin an environment, unless it is there, with what takes longest to fetch; the checkout is not touched."""
    if any(_is_there(pair, environment / stamp) for stamp in ("begun_of", "made_of")):
        return
    shutil.rmtree(environment, ignore_errors=True)
    _run([python, "-m", "venv", environment])
    others = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    others = [line for line in others if not line.startswith(("torch==", "torchvision==", "triton=="))]
    # Where a CPU build (2.13.0+cpu) lies in a folder of wheels, == would take it.
    of_the_pair = [f"torch==={pair.torch}", f"torchvision==={pair.torchvision}"]
    (environment / "constraints.txt").write_text("\n".join([*others, *of_the_pair, ""]))
    _run([environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--upgrade", "pip"])
    _run([*_pip(environment), "torch", "torchvision"])
    (environment / "begun_of").write_text(_made_of(pair), encoding="utf-8")


def _is_there(pair: TriedPair, stamp: Path) -> bool:
    return stamp.exists() and stamp.read_text(encoding="utf-8") == _made_of(pair)


def _made_of(pair: TriedPair) -> str:
    wanted = [(REPOSITORY / name).read_text(encoding="utf-8") for name in ("setup.py", "constraints.txt")]
    return "\n".join([*pair, *OTHERS, *wanted])


def _pip(environment: Path) -> list[str | Path]:
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet"]
    return [*pip, "--constraint", environment / "constraints.txt"]


def _run(words: Sequence[str | Path]) -> None:
    """Run a step of an environment's making (raises MachineError); what is said about a failure stands above it."""
    code = subprocess.run(words, cwd=REPOSITORY, check=False).returncode
    if code != 0:
        raise MachineError(
            f"{shlex.join(map(str, words))} ended with {code}; its message is above: give --folder a place with 6 GB "
            "free for each pair, and pip a way to its index"
        )


def _name(pair: TriedPair) -> str:
    return f"torch{pair.torch}-torchvision{pair.torchvision}-python{pair.python}"


if __name__ == "__main__":
    sys.exit(main())
