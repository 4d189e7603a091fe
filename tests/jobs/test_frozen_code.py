"""A job runs the copy of the code that its batch script names, also from inside a checkout that has changed since."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptive.errors import MachineError
from adaptive.files import code_root
from adaptive.jobs import code_version
from adaptive.jobs.code_version import check_frozen_code, copy_code, list_code
from adaptive.jobs.requeue import read_history

SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'  # starts the one task here
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NAME": "job"}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen copy that notes its starts; its training and evaluation take no time."""
    folder = tmp_path_factory.mktemp("run") / "submitted" / "code"
    copy_code(folder)
    for name, line in {
        "__init__.py": "import os, sys; print(*sys.orig_argv[1:6], file=open(os.environ['STARTS'], 'a'))",
        "commands/train.py": "def _train(config): return 0",
        "commands/evaluate.py": "def load_run(*_): raise SystemExit(0)",
    }.items():
        with (folder / "adaptive" / name).open("a") as file:
            file.write(f"\n{line}\n")
    list_code(folder)
    return folder


@pytest.fixture
def checkout(tmp_path: Path, digits: Path) -> Path:
    """A checkout that has changed since: whatever imports its code ends at once."""
    folder = tmp_path / "checkout"
    (folder / "adaptive").mkdir(parents=True)
    (folder / "adaptive" / "__init__.py").write_text("raise SystemExit('the changed checkout runs')\n")
    config = f"model: {{backbone: test_resnet}}\ndata: {{path: {digits}}}\ntrain: {{run_folder: run}}\n"
    (folder / "small.yaml").write_text(config)
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    return folder


def run_script(checkout: Path, frozen: Path, *action: str, **variables: str) -> list[str]:
    """Run an action of the batch scripts from inside the checkout; return the starts that the frozen code noted."""
    starts = checkout / "starts"
    environment = os.environ | JOB | variables | {
        "ADAPTIVE_HOME": str(frozen),
        "ADAPTIVE_PYTHON": sys.executable,
        "PATH": f"{checkout.parent}:{os.environ['PATH']}",
        "STARTS": str(starts),
    }  # fmt: skip
    words = ["bash", "-c", '. "$ADAPTIVE_HOME/slurm/lib.sh"; "$@"', "job", *action]
    with (checkout / "log").open("w+") as log:  # not a pipe: a child that waits for srun's end outlives the script
        done = subprocess.run(words, cwd=checkout, env=environment, stdout=log, stderr=log, timeout=120, check=False)
        log.seek(0)
        assert done.returncode == 0, log.read()
    return starts.read_text().splitlines()


@pytest.mark.parametrize("path", ["", "."], ids=["plain", "PYTHONPATH names the checkout"])
def test_training_staging_and_requeueing_run_the_frozen_code(
    frozen: Path, checkout: Path, tmp_path: Path, path: str
) -> None:
    starts = run_script(
        checkout, frozen, "train", "small.yaml", PYTHONPATH=path,
        ADAPTIVE_CONTAINER=f"env PYTHONPATH={path}",  # an image with an environment of its own
        ADAPTIVE_STAGE=str(tmp_path / "stage"),
    )  # fmt: skip
    assert starts == [
        "-P -m adaptive.jobs.requeue begin --",
        "-u -P -m adaptive.jobs.stage --",
        "-u -P -m adaptive train",
        "-P -m adaptive.jobs.requeue end --code",
    ]
    assert list((tmp_path / "stage").rglob("*.tar"))
    assert read_history(checkout / "run")[-1]["decision"] == "done"


def test_evaluation_runs_the_frozen_code(frozen: Path, checkout: Path) -> None:
    assert run_script(checkout, frozen, "evaluate", "run") == ["-u -P -m adaptive evaluate"]


@pytest.mark.parametrize(
    "words",
    [
        ["adaptive.jobs.requeue", "begin", "--", "small.yaml"],
        ["adaptive.jobs.requeue", "end", "--code", "0", "--", "run"],
        ["adaptive.jobs.stage", "small.yaml"],
        ["adaptive", "train", "small.yaml"],
        ["adaptive", "evaluate", "run"],
    ],
    ids=" ".join,
)
def test_other_code_is_refused_in_a_line(words: list[str], frozen: Path, checkout: Path) -> None:
    """Also where something has put another copy first: what runs in the tests is not the frozen copy."""
    environment = os.environ | JOB | {"ADAPTIVE_HOME": str(frozen), "PYTHONPATH": str(code_root())}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *words], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")  # an error that another start would meet again
    [line] = done.stderr.splitlines()
    assert f"ADAPTIVE_HOME = '{frozen}' is this job's code, but '{code_root()}' runs; leave ADAPTIVE_HOME" in line
    assert not (checkout / "run").exists()


def test_a_copy_that_cannot_be_read_is_to_be_mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_frozen_code()  # outside of a job nothing is promised
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "link").symlink_to(code_root())
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "link"))
    check_frozen_code()
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(MachineError, match="it cannot be read here: No such file or directory; mount it"):
        check_frozen_code()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda code: (code / "adaptive" / "commands" / "plan.py").unlink(), "adaptive/commands/plan.py is missing"),
        (lambda code: (code / "slurm" / "lib.sh").write_text("exit 3"), "slurm/lib.sh is not what was frozen"),
    ],
    ids=["missing", "changed"],
)
def test_a_copy_that_is_not_whole_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], words: str
) -> None:
    copy_code(tmp_path / "code")
    monkeypatch.setattr(code_version, "code_root", lambda: tmp_path / "code")
    monkeypatch.setenv("ADAPTIVE_HOME", str(tmp_path / "code"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    check_frozen_code()
    damage(tmp_path / "code")
    with pytest.raises(MachineError, match=f"{words}; submit again"):
        check_frozen_code()
    monkeypatch.setenv("SLURM_LOCALID", "3")  # one task of a node looks
    check_frozen_code()
