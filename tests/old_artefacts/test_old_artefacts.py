"""What earlier code wrote is read: a dataset, a run with its policy, an export, a job that was submitted with its code.

make.py made the files beside this one; README.md says which code with, and what may be done when one no longer fits.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adaptive

HERE = Path(__file__).parent
ADAPTIVE = [sys.executable, "-m", "adaptive"]
COMMIT = "963af4cd04d77156353eac50f381c22c705ab46c"

# srun starts the one task here, but for the job's second start, which is stopped at once; a requeue ends the script.
PROGRAMS = {
    "srun": '[ "$SLURM_RESTART_COUNT" != 1 ] || exit 75\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then kill -TERM "$PPID"; else echo " JobState=RUNNING "; fi',
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node2", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0"}
# Python before 3.11.4, which Debian 12 has, knows no filters.
FILTER = getattr(tarfile, "data_filter", lambda member, path: member)


def unpack(folder: Path) -> Path:
    """Put everything into a folder as it lay when it was made, with the paths of this machine."""
    for name in ("dataset", "run", "export"):
        shutil.copytree(HERE / name, folder / name)
    with tarfile.open(HERE / "submitted.tar.xz") as tar:
        tar.extraction_filter = FILTER
        tar.extractall(folder / "run")
    script = folder / "run" / "submitted" / "job.sbatch"
    text = script.read_text()
    for placeholder, path in (("@FOLDER@", folder), ("@PYTHON@", sys.executable)):
        text = text.replace(placeholder, shlex.quote(str(path)))
    script.write_text(text)
    return folder


def command(folder: Path, *words: str) -> str:
    """Run a command of the present code where the old paths, which are relative, hold; return what it prints."""
    done = subprocess.run([*ADAPTIVE, *words], cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done
    return done.stdout


def alike(found: Any, before: Any, where: str = "") -> None:
    """Compare JSON: numbers up to what processors differ by; entries that are new to an object are passed over."""
    if isinstance(before, dict):
        assert found.keys() >= before.keys(), where
        for key, value in before.items():
            alike(found[key], value, f"{where}/{key}")
    elif isinstance(before, list):
        assert len(found) == len(before), where
        for place, (one, other) in enumerate(zip(found, before, strict=True)):
            alike(one, other, f"{where}/{place}")
    elif isinstance(before, float):
        assert found == pytest.approx(before, abs=1e-4, rel=1e-4), where
    else:
        assert found == before, where


def read(name: str) -> Any:
    """Return what old code found."""
    return json.loads((HERE / name).read_text())


def lines(file: Path) -> list[dict[str, Any]]:
    """Return a JSONL file's objects."""
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, to be read."""
    return unpack(tmp_path_factory.mktemp("old"))


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, continued by the present code to its end."""
    folder = unpack(tmp_path_factory.mktemp("continued"))
    command(folder, "train", "run/config.yaml", "train.resume=must")
    return folder / "run"


@pytest.fixture(scope="module")
def images(old: Path) -> Sequence[str]:
    """The test split as files, in the order in which they were predicted; relative to the folder."""
    (old / "test-images").mkdir()
    with tarfile.open(old / "dataset" / "test-00000.tar") as tar:
        tar.extraction_filter = FILTER
        for member in tar.getmembers():
            if member.name.endswith(".png"):
                tar.extract(member, old / "test-images")
    return [row["image"] for row in read("predictions.json")]


def test_weights_are_those_of_the_checkpoint(old: Path) -> None:
    [checkpoint] = (old / "run" / "checkpoints").iterdir()
    for averaged, file in ((None, "ema"), (False, "weights")):
        loaded = adaptive.load(old / "run", averaged=averaged).network.state_dict()
        same_tensors(loaded, load_file(checkpoint / f"{file}.safetensors"))


@pytest.mark.full  # an export and a policy measure alike
def test_a_run_measures_what_it_measured(old: Path) -> None:
    found = json.loads(command(old, "evaluate", "run", "--no-timing", "--json"))
    alike(found, read("run/evaluation_test.json"))


def test_a_run_with_its_policy_answers_what_it_answered(old: Path, images: Sequence[str]) -> None:
    told = command(old, "predict", "run", "test-images", "--json", "--top", "2")
    alike([json.loads(line) for line in told.splitlines()], read("predictions.json"))


def test_an_export_answers_what_its_run_answered(old: Path, images: Sequence[str]) -> None:
    classifier = adaptive.OnnxClassifier(old / "export", threads=1)
    found = classifier.predict(classifier.open_images([old / image for image in images]))
    answers = [(classifier.classes[label], exit_) for label, exit_ in zip(found.labels, found.exits, strict=True)]
    before = read("predictions.json")
    assert answers == [(row["label"], row["exit"]) for row in before]
    assert found.confidences.tolist() == pytest.approx([row["confidence"] for row in before], abs=1e-4)


@pytest.mark.end_to_end
def test_an_interrupted_run_goes_on_from_its_step_with_the_planned_samples(continued: Path) -> None:
    expected = read("expected.json")
    log = (continued / "metrics.jsonl").read_bytes()
    begun = (HERE / "run" / "metrics.jsonl").read_bytes()
    assert log.startswith(begun)
    alike([json.loads(line) for line in log.removeprefix(begun).splitlines()], expected["records"])
    taken = lines(continued / "samples" / "rank-0000.jsonl")
    assert {str(line["step"]): line["ids"] for line in taken} == expected["samples"]
    last = continued / "checkpoints" / f"step-{expected['ends_at']:08}"
    assert json.loads((last / "state.json").read_text())["drawn_by"] == "sample", "it would go on with other draws"


@pytest.mark.end_to_end
@pytest.mark.full
def test_a_submitted_job_goes_on_with_its_own_code_to_the_same_weights(continued: Path, tmp_path: Path) -> None:
    """Its old code beside the present one on one machine: here what they come to is the same bit for bit."""
    folder = unpack(tmp_path / "work")
    run = folder / "run"
    for name, text in PROGRAMS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{text}\n")
        program.chmod(0o755)

    def start(number: int) -> tuple[int, str, dict[str, Any]]:
        """Start the job once more; return its exit code, its log, and what was decided."""
        variables = JOB | {"SLURM_RESTART_COUNT": str(number), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        # Not a pipe: a child of the script that waits for srun's end outlives it by seconds.
        with (tmp_path / "job.log").open("w") as log:
            done = subprocess.run(
                ["bash", run / "submitted" / "job.sbatch"], cwd=folder, env=os.environ | variables,
                stdout=log, stderr=log, timeout=240, check=False,
            )  # fmt: skip
        return done.returncode, (tmp_path / "job.log").read_text(), lines(run / "requeues.jsonl")[-1]

    code, log, decided = start(1)
    assert (code, decided["decision"]) == (-signal.SIGTERM, "requeue"), log
    assert decided["step"] == read("expected.json")["begins_at"]
    code, log, decided = start(2)
    assert (code, decided["decision"]) == (0, "done"), log
    [origin] = lines(run / "environment.jsonl")
    assert (origin["code"]["commit"], origin["slurm"]["restart"]) == (COMMIT, "2")

    kept, theirs = (sorted((folder / "checkpoints").iterdir()) for folder in (continued, run))
    assert [path.name for path in kept] == [path.name for path in theirs]
    for name in ("weights", "ema", "optimizer"):
        same_tensors(load_file(kept[-1] / f"{name}.safetensors"), load_file(theirs[-1] / f"{name}.safetensors"))


def same_tensors(found: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    """Compare names, types and every bit."""
    assert found.keys() == before.keys()
    for name, tensor in before.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
