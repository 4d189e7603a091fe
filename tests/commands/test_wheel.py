"""The wheel alone, in an empty folder: what a user has who installed it and holds no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive.doctor.checks.network import free_port
from adaptive.jobs.code_version import copy_code
from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE

COMMAND = ["-P", "-m", "adaptive"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was unpacked, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.unpack_archive(build_wheel(tmp_path_factory.mktemp("source") / "code"), folder, "zip")
    return folder


def build_wheel(source: Path) -> Path:
    """This checkout's wheel, built in a copy of the sources, which is made."""
    copy_code(source)
    shutil.copytree(REPOSITORY / "launcher", source / "launcher")  # it is not to be taken along
    for name in ("setup.py", "pyproject.toml", "README.md", "adaptive_training.py"):
        shutil.copy(REPOSITORY / name, source)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True, timeout=PATIENCE)
    [wheel] = source.glob("*.whl")
    return wheel


def python(installed: Path, cwd: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_it_installs_one_package_with_the_batch_scripts_and_the_command(installed: Path) -> None:
    unpacked = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert unpacked == {"adaptive", "adaptive_training.py"}
    scripts = {path.name for path in (installed / "adaptive" / "slurm").iterdir()}
    assert scripts == {path.name for path in (REPOSITORY / "slurm").iterdir()}
    [entry_points] = installed.glob("*.dist-info/entry_points.txt")
    assert entry_points.read_text() == "[console_scripts]\nadaptive = adaptive_training:main\n"


def test_commands_work_without_a_checkout(installed: Path, tmp_path: Path, config_file: Path) -> None:
    shown = python(installed, tmp_path, *COMMAND, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "usage: adaptive" in shown.stdout
    found = python(installed, tmp_path, *COMMAND, "doctor", "--quick", "--only", "python,packages", "--json")
    assert found.returncode == 0, found
    assert [finding["status"] for finding in json.loads(found.stdout)["findings"]] == ["ok", "ok"]
    dry = python(installed, tmp_path, *COMMAND, "submit", config_file, "--cpu", "--dry-run")
    assert dry.returncode == 0, dry
    assert dry.stdout.splitlines()[-1].startswith("train ")
    assert list(tmp_path.iterdir()) == []


def test_a_job_is_frozen_from_it(installed: Path, tmp_path: Path, config_file: Path) -> None:
    code = (
        "from adaptive.jobs.submission import *; from adaptive.config.loading import load_config; import adaptive\n"
        f"config = load_config({str(config_file)!r}); print(adaptive.__file__)\n"
        "from pathlib import Path; freeze({'config.yaml': config}, Path('run'), render_training(config, Resources()))"
    )
    done = python(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == str(installed / "adaptive" / "__init__.py")
    frozen = tmp_path / "run" / "submitted" / "code"
    assert sorted(path.name for path in frozen.iterdir()) == ["adaptive", "frozen.json", "slurm"]
    assert (frozen / "slurm" / "lib.sh").is_file()

    incomplete = tmp_path / "installed"
    shutil.copytree(installed / "adaptive", incomplete / "adaptive", ignore=shutil.ignore_patterns("slurm"))
    assert "the batch scripts are missing" in python(incomplete, tmp_path, "-c", code).stderr


@pytest.mark.end_to_end
@pytest.mark.ranks
@pytest.mark.full
def test_torchrun_trains_without_a_checkout(installed: Path, tmp_path: Path, config_file: Path) -> None:
    ranks = ["-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    run = tmp_path / "run"
    done = python(installed, tmp_path, *ranks, "-m", "adaptive", "train", config_file, f"train.run_folder={run}")
    assert done.returncode == 0, done
    assert f"trained: {run}" in done.stdout
    [origin] = [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]
    assert (origin["launcher"], origin["code"]["root"]) == ("torchrun", str(installed))
