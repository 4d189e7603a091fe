"""Make the artefacts in this folder with the code of a checkout: ``python make.py CODE [DEST]``.

CODE is the root of a checkout of any commit, DEST by default the folder of this file. Everything happens in a temporary
folder, by commands alone, as a user on a Slurm cluster would give them: pack, submit, a start of the job that SIGUSR1
ends in the middle of an epoch, calibrate, evaluate, predict, export, and at last the same run to its end.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
CLASSES, SIDE, STEPS_PER_EPOCH = ("checked", "lying", "standing"), 16, 12
MARGIN = 2e-4  # of confidences
IMAGES = {"train": 48, "val": 24, "test": 24}

# A narrow network, so that weights, two kinds of optimizer state and averages are small; every kind of random draw. The
# large eps keeps Adam from making steps of what is rounding alone, which no two processors have in common.
CONFIG = f"""
model:
  backbone: test_resnet
  exits: [maxpool, layer2]
  head_dropout: 0.1
  options: {{channels: [8, 8, 8, 8], stem_width: 4}}
data: {{path: dataset, image_size: {SIDE}, crop: pad, crop_padding: 2, mixup: 0.2, label_smoothing: 0.1, workers: 0}}
optimizer: {{name: adamw, lr: 0.02, decay_norm_and_bias: false, layer_decay: 0.9, options: {{eps: 1.0e-3}}}}
schedule: {{warmup_epochs: 1}}
train: {{run_folder: run, epochs: 4, global_batch: 4, ema_decay: 0.9, clip_norm: 5.0, device: cpu}}
distillation: {{gamma: 0.1}}
evaluate: {{every_epochs: 2}}
checkpoint: {{keep: 1}}
tracking: {{every_steps: 1, sample_ids: true, system_seconds: 0}}
"""

# What stands in for Slurm: srun starts the one task here, a requeue ends the batch script.
PROGRAMS = {
    "sbatch": "echo 7",
    "srun": 'while [[ $1 == -* ]]; do shift; done; SLURM_PROCID=0 exec "$@"',
    "scontrol": 'if [ "$1" = requeue ]; then kill -TERM "$PPID"; else echo " JobState=RUNNING "; fi',
}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1"}
# Of the machine and the moment, or nothing that is read again.
LEFT_OUT = ("environment.jsonl", "*.png", "*.log", ".lock", ".owner", ".slurm", "submitted", "__pycache__")


def main(code: Path, destination: Path) -> None:
    """Make everything, then replace what lies in ``destination``."""
    with tempfile.TemporaryDirectory(prefix="adaptive-") as scratch:
        work = Path(scratch).resolve() / "work"
        work.mkdir()
        make = Maker(code, work)
        make.dataset()
        make.interrupted_run()
        make.answers()
        make.continued_run()
        make.publish(destination)


class Maker:
    """Runs the commands of the code in ``code`` in the folder ``work``."""

    def __init__(self, code: Path, work: Path) -> None:
        self.code, self.work = code, work
        module = "adaptive" if (code / "adaptive" / "__main__.py").is_file() else "launcher.main"
        self.command = [sys.executable, "-m", module]
        self.programs = work.with_name("bin")
        self.programs.mkdir()
        for name, lines in PROGRAMS.items():
            (self.programs / name).write_text(f"#!/bin/bash\n{lines}\n")
            (self.programs / name).chmod(0o755)
        path = f"{self.programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {"PATH": path, "PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}

    def adaptive(self, *words: str, cwd: Path | None = None) -> str:
        """Run a command and return what it prints."""
        command = [*self.command, *words]
        done = subprocess.run(command, cwd=cwd or self.work, env=self.environment, stdout=subprocess.PIPE, check=True)
        return done.stdout.decode()

    def without_paths(self) -> Maker:
        """Return the same behind links: ONNX files name the files of the code that was exported, which are ours."""
        links = self.work.with_name("links")
        links.mkdir()
        (links / "environment").symlink_to(sys.prefix)
        (links / "code").symlink_to(self.code)
        other = copy.copy(self)
        other.command = [str(links / "environment" / "bin" / "python"), *self.command[1:]]
        other.environment = self.environment | {"PYTHONPATH": str(links / "code")}
        return other

    def dataset(self) -> None:
        """Pack stripes, lying and standing, and checks, with noise, in colours of chance."""
        draw = np.random.default_rng(0)
        across = np.arange(SIDE) // 2 % 2
        patterns = [across[:, None] ^ across, np.repeat(across[:, None], SIDE, 1), np.repeat(across[None], SIDE, 0)]
        for split, count in IMAGES.items():
            for number in range(count):
                kind = number % len(CLASSES)
                light, dark = draw.integers(100, 256, 3), draw.integers(0, 156, 3)
                pixels = np.where(patterns[kind][..., None], light, dark) + draw.normal(0, 70, (SIDE, SIDE, 1))
                file = self.work / "images" / split / CLASSES[kind] / f"{split}-{number:02}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                # 16 levels: as PNG half the bytes.
                Image.fromarray((pixels.clip(0, 255) // 16 * 16).astype(np.uint8)).save(file, optimize=True)
        self.adaptive("pack", "images", "dataset", "--shard-count", "24", "--workers", "1")

    def interrupted_run(self) -> None:
        """Submit a job and let its first start be interrupted in the second epoch; it asks to be requeued."""
        (self.work / "small.yaml").write_text(CONFIG)
        self.adaptive("submit", "small.yaml", "--cpu", "--time", "2:00:00", "--name", "small")
        run = self.work / "run"
        with (self.work / "job.log").open("wb") as log:
            job = subprocess.Popen(
                ["bash", run / "submitted" / "job.sbatch"],
                cwd=self.work, env=self.environment | JOB, stdout=log, stderr=log,
            )  # fmt: skip
        wait_for(run / "metrics.jsonl", lambda: last_step(run) > STEPS_PER_EPOCH + 4, job)
        job.send_signal(signal.SIGUSR1)
        ended = job.wait(300)
        told = (self.work / "job.log").read_text()
        assert ended == -signal.SIGTERM, told
        assert STEPS_PER_EPOCH < last_step(run) < 2 * STEPS_PER_EPOCH, f"not interrupted in the middle: {told}"
        requeues = [json.loads(line) for line in (run / "requeues.jsonl").read_text().splitlines()]
        assert requeues[-1]["decision"] == "requeue"

    def answers(self) -> None:
        """Calibrate, evaluate, predict and export the run as it was interrupted."""
        self.adaptive("evaluate", "run", "--no-timing")
        unpack_images(self.work / "dataset", self.work / "test-images")
        rows = next(filter(None, map(self.calibrated_predictions, ("0.7", "0.75", "0.8", "0.85", "0.9"))))
        write(self.work / "predictions.json", [{key: row[key] for key in row if key != "ms"} for row in rows])
        self.without_paths().adaptive("export", "run", "export", "--formats", "onnx")

    def calibrated_predictions(self, budget: str) -> list[dict[str, Any]] | None:
        """Calibrate; return the answers for the test images if they part, and stay where they are on any processor.

        There the last bits differ: nobody may stand very near to a threshold, or have two answers of one confidence.
        """
        self.adaptive("calibrate", "run", "--budget", budget, "--method", "geometric")
        rows = self.predict("run")
        exits = [row["exit"] for row in rows]
        if len(set(exits)) == 1:
            return None
        policy = json.loads((self.work / "run" / "policy.json").read_text())
        for change in (-MARGIN, MARGIN):
            thresholds = [value + change if 0 < value < 1 else value for value in policy["thresholds"]]
            (self.work / "near.json").write_text(json.dumps({**policy, "thresholds": thresholds}))
            if [row["exit"] for row in self.predict("run", "--policy", "near.json")] != exits:
                return None
        first, second = ([row["top"][place]["confidence"] for row in rows] for place in (0, 1))
        return rows if all(one - other > MARGIN for one, other in zip(first, second, strict=True)) else None

    def predict(self, run: str, *words: str) -> list[dict[str, Any]]:
        """Return the answers for the test images."""
        lines = self.adaptive("predict", run, "test-images", "--json", "--top", "2", *words).splitlines()
        return [json.loads(line) for line in lines]

    def continued_run(self) -> None:
        """Continue a copy of the run to its end, and note the samples and figures of every step."""
        other = self.work.with_name("other")
        for name in ("dataset", "run"):
            shutil.copytree(self.work / name, other / name)
        begun = last_step(self.work / "run")
        self.adaptive("train", "run/config.yaml", cwd=other)
        records = read_lines(other / "run" / "metrics.jsonl")
        samples = read_lines(other / "run" / "samples" / "rank-0000.jsonl")
        timed = ("images_per_second", "data_wait_share", "memory_gib")
        expected = {
            "begins_at": begun,
            "ends_at": last_step(other / "run"),
            "samples": {str(line["step"]): line["ids"] for line in samples},
            "records": [
                {key: value for key, value in record.items() if not key.endswith(timed)}
                for record in records
                if record["step"] > begun
            ],
        }
        write(self.work / "expected.json", expected)

    def publish(self, destination: Path) -> None:
        """Copy what is kept, without the paths of this machine."""
        names = ("dataset", "run", "export")
        for name in names:
            shutil.rmtree(destination / name, ignore_errors=True)
            shutil.copytree(self.work / name, destination / name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for name in ("predictions.json", "expected.json"):
            shutil.copy(self.work / name, destination)
        submitted = self.work / "run" / "submitted"
        for file in (submitted / "job.sbatch", submitted / "job.json", destination / "run" / "code_version.json"):
            text = file.read_text()
            for path, placeholder in ((self.work, "FOLDER"), (sys.executable, "PYTHON"), (self.code, "CODE")):
                text = text.replace(str(path), f"@{placeholder}@")
            file.write_text(text)
        with tarfile.open(destination / "submitted.tar.xz", "w:xz", preset=9) as tar:
            tar.add(submitted, "submitted", filter=nobodys)
        for own in (self.work, self.code, sys.prefix, sys.base_prefix, destination, Path.home()):
            held = [file for file in destination.rglob("*") if file.is_file() and str(own).encode() in content(file)]
            assert not held, f"{own} stands in {held}"


def unpack_images(dataset: Path, folder: Path) -> None:
    """Write the test split's images as files, named by their keys."""
    folder.mkdir()
    for shard in sorted(dataset.glob("test-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".png"):
                    (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]


def wait_for(file: Path, reached: Any, process: subprocess.Popen[bytes]) -> None:
    """Wait until a file is there and ``reached``; the process that brings it about must not end before."""
    until = time.monotonic() + 600
    while not (file.exists() and reached()):
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until, f"{file}: nothing came"
        time.sleep(0.002)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: Path) -> int:
    """Return the step of a run's last record."""
    return max((record["step"] for record in read_lines(run / "metrics.jsonl")), default=0)


def write(file: Path, value: Any) -> None:
    """Write JSON with a line per entry: small, and to be read in a comparison of versions."""
    if isinstance(value, list):
        text = "[\n" + ",\n".join(json.dumps(entry) for entry in value) + "\n]\n"
    else:
        text = json.dumps(value, indent=None) + "\n"
    file.write_text(text)


def nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out whose file it was, and when."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def content(file: Path) -> bytes:
    """Return a file's bytes, of an archive those of its members."""
    if file.suffixes[-2:] != [".tar", ".xz"]:
        return file.read_bytes()
    with tarfile.open(file) as tar:
        return b"".join(tar.extractfile(member).read() for member in tar if member.isfile())  # type: ignore[union-attr]


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else HERE)
