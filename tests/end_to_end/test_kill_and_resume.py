"""A run on two ranks that dies by SIGKILL and is started again ends, bit for bit, as one that nothing disturbed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from adaptive.doctor.checks.network import free_port
from adaptive.tracking.record import read
from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE

pytestmark = [pytest.mark.end_to_end, pytest.mark.ranks]

TRAIN = REPOSITORY / "launcher" / "train.py"
SAVED_EVERY, RECORDED_EVERY, EPOCH = 8, 4, 20
END = 3 * EPOCH

# All that a resumed run could get wrong: random draws of every kind, statistics, averages, momentum, a schedule.
CONFIG = f"""
model: {{backbone: test_resnet, exits: 3, head_dropout: 0.1, options: {{drop_path_rate: 0.2, drop_rate: 0.1}}}}
data:
  path: PATH
  image_size: 32
  crop: resize
  crop_scale: [0.5, 1.0]
  color_jitter: 0.2
  erasing: 0.25
  mixup: 0.2
  label_smoothing: 0.1
  workers: 1
optimizer: {{lr: 0.05}}
schedule: {{warmup_epochs: 1}}
train: {{epochs: 3, global_batch: 64, ema_decay: 0.9, clip_norm: 5.0, device: cpu, zero_stage: 2}}
distillation: {{gamma: 0.1}}
evaluate: {{batch: 100}}
checkpoint: {{every_steps: {SAVED_EVERY}, keep: 20}}
tracking: {{every_steps: {RECORDED_EVERY}}}
"""


class Launched:
    """The deepspeed launcher with two ranks, and everything it started."""

    def __init__(self, config: Path, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_suffix(".log")
        words = [str(config), f"train.run_folder={folder}"]
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*launcher, str(free_port()), str(TRAIN), *words],
                stdout=log, stderr=log, env=os.environ | {"DS_ACCELERATOR": "cpu"},
            )  # fmt: skip

    def wait(self, seconds: float = PATIENCE) -> None:
        assert self.process.wait(seconds) == 0, self.log.read_text()[-3000:]

    def kill_when(self, due: Callable[[Path], bool], seconds: float = PATIENCE) -> None:
        """SIGKILL all processes, the first rank before all others, as soon as ``due``."""
        until = time.monotonic() + seconds
        while not (self.folder / "metrics.jsonl").exists():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.02)
        ranks = psutil.Process(self.process.pid).children(recursive=True)
        first = next(process for process in ranks if "--local_rank=0" in process.cmdline())
        while not due(self.folder):
            assert self.process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < until
        first.kill()
        self.kill()

    def kill(self) -> None:
        """SIGKILL whatever still runs."""
        if self.process.poll() is not None:
            return
        launcher = psutil.Process(self.process.pid)
        everything = [launcher, *launcher.children(recursive=True)]
        for process in everything:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(everything)


@pytest.fixture(scope="module")
def launch(config: Path) -> Iterator[Callable[[Path], Launched]]:
    """Starts runs, and leaves none behind."""
    with ExitStack() as stack:

        def start(folder: Path) -> Launched:
            launched = Launched(config, folder)
            stack.callback(launched.kill)
            return launched

        yield start


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def while_saving(folder: Path) -> bool:
    """A checkpoint is being written, after the first epoch and well before the end."""
    writing = [name for name in checkpoints(folder) if name.startswith(".writing-")]
    return any(EPOCH < int(name[-8:]) < END - RECORDED_EVERY for name in writing)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    file = tmp_path_factory.mktemp("killed") / "run.yaml"
    file.write_text(CONFIG.replace("PATH", str(digits)))
    return file


@pytest.fixture(scope="module")
def whole(config: Path, launch: Callable[[Path], Launched]) -> Path:
    """The undisturbed run."""
    folder = config.with_name("whole")
    launch(folder).wait()
    return folder


# At ZeRO 2, where the optimizer's state lies in parts on both ranks; other stages stop and go on in test_trainer.
# Three real starts, killed in mid-epoch at the worst moment. tests/chaos kills forked ranks in all moments, and
# tests/cluster/test_hosts.py what deepspeed's launcher has started.
@pytest.mark.full
def test_killed_while_saving_and_started_again(whole: Path, launch: Callable[[Path], Launched], tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    run = launch(killed)
    run.kill_when(while_saving)
    left = checkpoints(killed)
    published = [int(name[-8:]) for name in left if name.startswith("step-")]
    recorded = read(killed / "metrics.jsonl")[-1]["step"]
    assert EPOCH <= max(published) <= recorded + RECORDED_EVERY < END, "not killed in the middle"
    assert [name for name in left if name.startswith(".writing-")], "killed too late: nothing was being written"

    launch(killed).wait()
    assert f"continuing {killed} from step {max(published)}" in run.log.read_text()
    assert [name for name in checkpoints(killed) if not name.startswith("step-")] == []
    compare_checkpoints(whole, killed)
    compare_records(read(whole / "metrics.jsonl"), read(killed / "metrics.jsonl"))
    expect_all_metrics(read(killed / "metrics.jsonl"))


def compare_checkpoints(whole: Path, killed: Path) -> None:
    name = f"checkpoints/step-{END:08d}"
    files = sorted(path.name for path in (whole / name).iterdir())
    expected = ["ema.safetensors", "manifest.json", "optimizer.safetensors", "state.json"]
    assert files == [*expected, "statistics.safetensors", "weights.safetensors"]
    for file in files:
        assert (killed / name / file).read_bytes() == (whole / name / file).read_bytes(), f"{file} differs"
    state = json.loads((killed / name / "state.json").read_text())
    assert state["progress"]["finished"]


def compare_records(whole: list[dict[str, Any]], killed: list[dict[str, Any]]) -> None:
    """Each step is recorded once, in order; but for clocks and memory the values are the same, too."""
    for records in (whole, killed):
        steps = [record["step"] for record in records if "train/loss" in record]
        assert steps == list(range(RECORDED_EVERY, END + 1, RECORDED_EVERY))
        assert [record["step"] for record in records if "val/loss" in record] == [EPOCH, 2 * EPOCH, 3 * EPOCH]
        assert [record["step"] for record in records] == sorted(record["step"] for record in records)
    assert without_clocks(whole) == without_clocks(killed)


def without_clocks(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what no two runs have in common."""
    own = ("train/images_per_second", "train/data_wait_share", "train/memory_gib")
    of_the_run = [record for record in records if not any(key.startswith(("system/", "ranks/")) for key in record)]
    return [{key: value for key, value in record.items() if key not in own} for record in of_the_run]


def expect_all_metrics(records: list[dict[str, Any]]) -> None:
    costs, trained, validated = (
        next(record for record in records if key in record) for key in ("model/exit_1/macs", "train/loss", "val/loss")
    )
    position = {"step", "epoch", "samples", "phase"}
    of_exits = {f"exit_{i}/{name}" for i in (1, 2, 3) for name in ("loss", "top1", "top5", "agreement")}
    assert set(costs) == position | {f"model/exit_{i}/{name}" for i in (1, 2, 3) for name in ("macs", "parameters")}
    speed = {"lr", "images_per_second", "data_wait_share", "memory_gib", "skipped_steps"}
    norms = {f"gradient_norm/{part}_{i}" for part in ("block", "exit") for i in (1, 2, 3)}
    of_training = {"loss", "cross_entropy", *speed, *norms, *of_exits, *(f"exit_{i}/divergence" for i in (1, 2, 3))}
    assert set(trained) == position | {f"train/{name}" for name in of_training}
    of_validation = {f"{kind}/{name}" for kind in ("val", "val_ema") for name in ("loss", "images", *of_exits)}
    assert set(validated) == position | of_validation
    assert validated["val/images"] == validated["val_ema/images"] == 200
    assert costs["model/exit_1/macs"] < costs["model/exit_2/macs"] < costs["model/exit_3/macs"]
    assert trained["train/images_per_second"] > 0
    assert 0 <= trained["train/data_wait_share"] <= 1
    assert trained["train/memory_gib"] > 0.05
    assert all(trained[f"train/gradient_norm/block_{i}"] > 0 for i in (1, 2, 3))
