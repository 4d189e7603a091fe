"""Ctrl-C as terminals send it, to a whole process group: training saves, and packing leaves nothing half done."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from adaptive.doctor.checks.network import free_port
from adaptive.tracking.record import read
from tests.helpers.commands import ADAPTIVE
from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE

pytestmark = [pytest.mark.chaos, pytest.mark.end_to_end, pytest.mark.full]

CONFIG = """
model: {backbone: test_resnet, exits: 2}
data: {path: PATH, image_size: 32, workers: 2}
optimizer: {lr: 0.05}
train: {epochs: 40, global_batch: 64, device: cpu}
tracking: {every_steps: 1, gradient_norms: false}
"""
LAUNCHERS = {
    "deepspeed": ["--num_gpus", "2", "--master_port", "PORT"],
    "torchrun": ["--nproc-per-node", "2", "--master-port", "PORT"],
}


def as_from_a_terminal() -> None:
    """Heed what the tests themselves may have been told to ignore, in the background of a script."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Group:
    """A process group of a terminal's, and what its processes say."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                words,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                env=os.environ | {"DS_ACCELERATOR": "cpu"},
                preexec_fn=as_from_a_terminal,
            )
        self.leader = psutil.Process(self.process.pid)
        self.all: list[psutil.Process] = []

    def until(self, due: Callable[[], bool]) -> None:
        limit = time.monotonic() + PATIENCE
        while not due():
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < limit, self.tail()
            time.sleep(0.02)
        self.all = self.leader.children(recursive=True)

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        code = self.process.wait(PATIENCE)
        _, left = psutil.wait_procs(self.all, timeout=PATIENCE)
        for process in left:
            process.kill()
        assert not left, self.tail()
        return code

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


def steps(run: Path) -> int:
    return max((record["step"] for record in read(run / "metrics.jsonl")), default=0) if run.exists() else 0


@pytest.fixture
def config(tmp_path: Path, digits: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(CONFIG.replace("PATH", str(digits)))
    return file


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_training_under_a_launcher_saves(launcher: str, number: int, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    port = str(free_port())
    options = [port if word == "PORT" else word for word in LAUNCHERS[launcher]]
    program = str(Path(sys.executable).with_name(launcher))
    words = [program, *options, str(REPOSITORY / "launcher" / "train.py"), str(config), f"train.run_folder={run}"]
    group = Group(words, tmp_path / "log")
    group.until(lambda: (run / "metrics.jsonl").is_file() and steps(run) >= 5)
    group.send(number)
    group.end()
    text = group.log.read_text(errors="replace")
    assert f"stopped by {signal.Signals(number).name} after step " in text, group.tail()
    assert "the same command continues the run" in text
    assert "without saving" not in text
    assert list((run / "checkpoints").glob("step-*")), group.tail()
    # The launcher itself may end in a traceback of its own, the ranks and their data workers do not.
    assert "[rank" not in text
    assert "DataLoader worker" not in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_training_alone_ends_as_when_it_is_asked_to_stop(number: int, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    group = Group([ADAPTIVE, "train", str(config), f"train.run_folder={run}"], tmp_path / "log")
    group.until(lambda: (run / "metrics.jsonl").is_file() and steps(run) >= 5)
    group.send(number)
    assert group.end() == 75
    assert "Traceback" not in group.tail()
    assert f"adaptive train: stopped by {signal.Signals(number).name} after step " in group.tail()
    assert list((run / "checkpoints").glob("step-*"))


def test_nohup_is_not_stopped_by_a_hangup(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["nohup", ADAPTIVE, "train", str(config), f"train.run_folder={run}", "train.epochs=2"]
    group = Group(words, tmp_path / "log")
    group.until(lambda: (run / "metrics.jsonl").is_file() and steps(run) >= 5)
    group.send(signal.SIGHUP)
    assert group.end() == 0, group.tail()


def test_packing_ends_with_one_line_and_goes_on_later(tmp_path: Path) -> None:
    from PIL import Image

    source = tmp_path / "source"
    for label in ("a", "b"):
        (source / label).mkdir(parents=True)
        for number in range(150):
            Image.effect_noise((400, 400), number % 90 + 1).convert("RGB").save(source / label / f"{number}.png")
    words = ["pack", str(source), str(tmp_path / "packed"), "--workers", "2", "--max-side", "390"]
    group = Group([ADAPTIVE, *words], tmp_path / "log")
    group.until((tmp_path / "packed.packing" / "records").is_dir)
    group.send(signal.SIGINT)
    assert group.end() == 130, group.tail()
    assert group.log.read_text() == "adaptive pack: interrupted\n"
    assert not (tmp_path / "packed").exists()


RUN = "RUN"
LONG = [
    ["evaluate", RUN, "--workers", "2"],
    ["calibrate", RUN, "--budget", "0.5", "--workers", "2"],
    ["report", RUN, "--workers", "2", "--out", "page"],
    ["bench", "inference", RUN, "--batch", "64"],
    ["export", RUN, "exported"],
    ["plan", "run.yaml"],
]


@pytest.mark.parametrize("words", LONG, ids=lambda words: words[0])
def test_a_long_command_ends_with_one_line(words: list[str], existing_run: Path, config: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(existing_run, copy)
    before = {path.relative_to(copy) for path in copy.rglob("*")}
    names = {RUN: str(copy), "run.yaml": str(config), "page": str(tmp_path / "page")}
    names["exported"] = str(tmp_path / "exported")
    group = Group([ADAPTIVE, *(names.get(word, word) for word in words)], tmp_path / "log")
    maps = Path(f"/proc/{group.process.pid}/maps")
    group.until(lambda: "libtorch_cpu" in maps.read_text())
    group.send(signal.SIGINT)
    assert group.end() == 130, group.tail()
    assert group.tail().splitlines()[-1] == f"adaptive {words[0]}: interrupted"
    assert "Traceback" not in group.tail()
    assert {path.relative_to(copy) for path in copy.rglob("*")} == before
    assert not (tmp_path / "exported").exists()


def test_verifying_ends_with_one_line(tmp_path: Path) -> None:
    from PIL import Image

    for label in ("a", "b"):
        (tmp_path / "source" / label).mkdir(parents=True)
        for number in range(60):
            file = tmp_path / "source" / label / f"{number}.png"
            Image.effect_noise((700, 700), number % 90 + 1).convert("RGB").save(file)
    packed = str(tmp_path / "packed")
    subprocess.run([ADAPTIVE, "pack", str(tmp_path / "source"), packed, "--workers", "2"], check=True)
    group = Group([ADAPTIVE, "pack", "--verify", packed, "--workers", "2"], tmp_path / "log")
    group.until(lambda: bool(group.leader.children()))
    group.send(signal.SIGINT)
    assert group.end() == 130, group.tail()
    assert group.log.read_text().splitlines()[-1] == "adaptive pack: interrupted"
    assert "Traceback" not in group.tail()
