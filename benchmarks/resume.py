"""How long a continued run takes to its first batch, and to its first step, by the position it is continued from.

    python benchmarks/resume.py --images 100000

The order of images is a function of seed and epoch, so going on in the middle of an epoch reads nothing of what came
before: the times must not depend on the position. benchmarks/README.md says how to read the result.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from adaptive.config.loading import parse_config
from adaptive.config.sections import Config
from adaptive.data.reading.stream import LoaderOptions, TrainStream
from adaptive.data.shards.index import ShardInfo, SplitInfo, load_index, write_index
from adaptive.files import file_sha256
from adaptive.training.checkpoints.store import CheckpointStore
from benchmarks.shared.locations import REPOSITORY, RESULTS
from benchmarks.shared.results import machine
from benchmarks.shared.timing import Spread

CLASSES, SHARD, SIDE, BATCH = 10, 1000, 32, 64
EPOCHS = 60


@dataclass(frozen=True)
class ResumeSettings:
    """What is measured."""

    images: int = 100_000
    workers: int = 1
    rounds: int = 7
    starts: int = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    settings, output = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        generate(data, settings.images)
        steps = settings.images // BATCH
        positions = {
            "0 %": 1,
            "50 %": steps // 2,
            "99 %": steps * 99 // 100,
            "epoch 50": 50 * steps + steps // 2,
        }
        tree = config(data, Path(folder) / "run", settings.workers)
        batches = first_batches(tree, positions, settings.rounds)
        starts = whole_starts(tree, Path(folder), positions, settings.starts)
    result = {
        "benchmark": "resume",
        "command": command(settings),
        "settings": asdict(settings),
        "machine": machine("cpu"),
        "positions": positions,
        "steps_per_epoch": steps,
        "first_batch_s": compared(batches),
        "first_step_s": compared(starts),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "resume_cpu.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output / "resume_cpu.md").write_text(page(result), encoding="utf-8")
    print(page(result))
    return 0


def parse(arguments: Sequence[str] | None) -> tuple[ResumeSettings, Path]:
    """Read the command line."""
    d = ResumeSettings()
    p = argparse.ArgumentParser(prog="resume", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--images", type=int, default=d.images, help="in the data set (%(default)s)")
    p.add_argument("--workers", type=int, default=d.workers, help="loader processes (%(default)s)")
    p.add_argument("--rounds", type=int, default=d.rounds, help="first batches per position (%(default)s)")
    p.add_argument("--starts", type=int, default=d.starts, help="starts of a process per position (%(default)s)")
    p.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files (benchmarks/results)")
    given = vars(p.parse_args(arguments))
    output = given.pop("output")
    return ResumeSettings(**given), output


def command(settings: ResumeSettings) -> str:
    """Return the command line that repeats this run."""
    words = ["python", "benchmarks/resume.py"]
    for name, value in asdict(settings).items():
        if value != getattr(ResumeSettings(), name):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def generate(folder: Path, images: int) -> None:
    """Write a packed data set of small JPEGs, ``images`` to train on and a hundred for validation."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    pictures = []
    for _ in range(CLASSES * 20):
        stream = io.BytesIO()
        Image.fromarray(noise.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(stream, "JPEG")
        pictures.append(stream.getvalue())
    splits = {}
    for split, count in (("train", images), ("val", 100)):
        shards = [
            _shard(folder, f"{split}-{i:05d}.tar", split, first, min(SHARD, count - first), pictures)
            for i, first in enumerate(range(0, count, SHARD))
        ]
        splits[split] = SplitInfo(shards=shards, count=count)
    write_index(folder, [f"class {i}" for i in range(CLASSES)], splits)


def _shard(folder: Path, name: str, split: str, first: int, count: int, pictures: list[bytes]) -> ShardInfo:
    path = folder / name
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(first, first + count):
            picture = number % len(pictures)
            for extension, content in (("jpg", pictures[picture]), ("cls", str(picture % CLASSES).encode())):
                entry = tarfile.TarInfo(f"{split}-{number:08d}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return ShardInfo(name=name, count=count, bytes=path.stat().st_size, sha256=file_sha256(path))


def config(data: Path, run: Path, workers: int) -> Config:
    """A small network on the data set."""
    return parse_config(
        {
            "model": {"backbone": "test_resnet", "exits": 3},
            "data": {"path": str(data), "image_size": SIDE, "workers": workers},
            "train": {"run_folder": str(run), "epochs": EPOCHS, "global_batch": BATCH, "device": "cpu"},
            "tracking": {"every_steps": 1, "gradient_norms": False},
        }
    )


def first_batches(tree: Config, positions: Mapping[str, int], rounds: int) -> dict[str, list[float]]:
    """Seconds from the first ``next`` to the first batch, one value per round, in a new order in each."""
    index = load_index(tree.data.path)
    seconds: dict[str, list[float]] = {name: [] for name in positions}
    order, generator = list(positions), random.Random(0)
    for number in range(-1, rounds):
        generator.shuffle(order)
        for name in order:
            loader = LoaderOptions(workers=tree.data.workers)
            stream = TrainStream(index, tree.data, "train", loader, seed=0, global_batch=BATCH, micro_batch=BATCH)
            batches = stream.batches(positions[name], positions[name] + 4)
            began = time.perf_counter()
            next(batches)
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
            batches.close()  # type: ignore[attr-defined]
    return seconds


def whole_starts(tree: Config, folder: Path, positions: Mapping[str, int], rounds: int) -> dict[str, list[float]]:
    """Seconds from the start of a training process to the record of its first step."""
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree.model_dump(mode="json")), encoding="utf-8")  # JSON is YAML
    _train(file, Path(str(tree.train.run_folder)), 1)
    seconds: dict[str, list[float]] = {name: [] for name in positions}
    order, generator = list(positions), random.Random(0)
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            seconds[name].append(_start_at(file, Path(str(tree.train.run_folder)), positions[name]))
    return seconds


def _start_at(file: Path, run: Path, step: int) -> float:
    """Continue a copy of the run as if it had come to ``step``."""
    copied = run.with_name("copied")
    shutil.rmtree(copied, ignore_errors=True)
    copied.mkdir()
    shutil.copy(run / "config.yaml", copied)
    saved = CheckpointStore(run / "checkpoints").all()[-1]
    state = saved.state()
    at = {"step": step, "samples": step * BATCH, "phase_step": step, "phase_applied": step, "finished": False}
    state["progress"] |= at
    tensors = {path.stem: saved.tensors(path.stem) for path in saved.path.glob("*.safetensors")}
    CheckpointStore(copied / "checkpoints").save(step, tensors, state, None)
    return _train(file, copied, step + 1)


def _train(file: Path, run: Path, steps: int) -> float:
    """Train up to ``steps`` in a process of its own; returns the seconds until the last step was recorded."""
    words = [sys.executable, str(REPOSITORY / "launcher" / "train.py"), str(file)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*words, f"train.run_folder={run}", f"train.max_steps={steps}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    seconds = 0.0
    while process.poll() is None:
        if not seconds and _recorded(run / "metrics.jsonl", steps):
            seconds = time.perf_counter() - began
        time.sleep(0.005)
    if process.returncode or not seconds:
        raise SystemExit(f"resume: the training ended with {process.returncode}: {process.stderr.read().decode()}")  # type: ignore[union-attr]
    return seconds


def _recorded(file: Path, step: int) -> bool:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return any('"train/loss"' in line and f'"step": {step},' in line for line in lines)


def compared(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Seconds per position, and their ratio to the first position's in the same round."""
    first = next(iter(seconds.values()))
    return {
        name: {"seconds": asdict(Spread.of(values)), "over_first": asdict(Spread.of_ratios(values, first))}
        for name, values in seconds.items()
    }


def page(result: Mapping[str, Any]) -> str:
    """The page beside the JSON file."""
    m, s = result["machine"], result["settings"]
    rows = [
        f"| {name} | {step} | {_cells(result['first_batch_s'][name])} | {_cells(result['first_step_s'][name])} |"
        for name, step in result["positions"].items()
    ]
    return f"""# Going on: {s["images"]:,} images, {result["steps_per_epoch"]} steps per epoch

`{result["command"]}`

{m["cpu"]}, {os.cpu_count()} cores, {s["workers"]} loader process(es); torch {m["torch"]}, timm {m["timm"]},
deepspeed {m["deepspeed"]}, Python {m["python"]}

Seconds from the first `next(batches)` to the first batch ({s["rounds"]} rounds), and from the start of a training
process to the record of its first step ({s["starts"]} rounds), all positions in turn within a round; median
(quartiles). The ratios to the first position, formed within the round, are the result: they must not grow with the
position.

| position | step | first batch, s | / 0 % | first step, s | / 0 % |
|---|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
"""


def _cells(entry: Mapping[str, Any]) -> str:
    return f"{_spread(entry['seconds'])} | {_spread(entry['over_first'])}"


def _spread(value: Mapping[str, float]) -> str:
    return f"{value['median']:.2f} ({value['q1']:.2f} - {value['q3']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
