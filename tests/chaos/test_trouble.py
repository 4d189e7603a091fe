"""Everything else that happens to a run: signals, hangs, full disks, no memory. It ends, or goes on, as documented."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from adaptive.errors import MachineError
from adaptive.tracking.record import read
from adaptive.training.preflight import occupy
from adaptive.training.supervision.peers import host_name
from tests.chaos.runs import Life
from tests.end_to_end.test_kill_and_resume import without_clocks
from tests.helpers.disks import fill, small_disk
from tests.helpers.waiting import PATIENCE

pytestmark = [pytest.mark.chaos, pytest.mark.ranks]

EPOCH, END = 20, 40
CONFIG = """
model: {backbone: test_resnet, exits: 2}
data: {path: PATH, image_size: 32, workers: 1}
optimizer: {lr: 0.05}
train: {epochs: 2, global_batch: 64, device: cpu, ema_decay: 0.9}
evaluate: {batch: 3}
tracking: {every_steps: 1, gradient_norms: false}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    file = tmp_path_factory.mktemp("trouble") / "run.yaml"
    file.write_text(CONFIG.replace("PATH", str(digits)))
    return file


@pytest.fixture(scope="module")
def whole(config: Path) -> Path:
    """The undisturbed run."""
    folder = config.with_name("whole")
    Life(config, folder).finish()
    return folder


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in (folder / "checkpoints").glob("step-*"))


def expect_the_same(folder: Path, whole: Path) -> None:
    name = f"checkpoints/step-{END:08d}"
    for file in sorted(path.name for path in (whole / name).iterdir()):
        assert (folder / name / file).read_bytes() == (whole / name / file).read_bytes(), f"{file} differs"
    own = [record for record in read(folder / "metrics.jsonl") if "checkpoint/failed" not in record]
    assert without_clocks(own) == without_clocks(read(whole / "metrics.jsonl"))


def validated(folder: Path) -> list[int]:
    return [record["step"] for record in read(folder / "metrics.jsonl") if "val/loss" in record]


@pytest.mark.full  # the test below sends SIGUSR1, and tests/training/supervision both to a process alone
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(number, config, whole, tmp_path):
    folder = tmp_path / "run"
    life = Life(config, folder)
    assert life.until(lambda: life.step >= 7)
    life.send(number, 1)
    assert life.wait() == [75, 75], life.tail()
    (stopped,) = steps_saved(folder)
    assert 7 <= stopped < EPOCH  # at once, not at the epoch's end
    assert f"after step {stopped} of {END}, saved in" in life.tail()
    Life(config, folder).finish()
    expect_the_same(folder, whole)


@pytest.mark.full  # signals between steps: supervision/test_signals.py
def test_a_signal_during_validation_stops_it_and_it_is_made_up_for(config, whole, tmp_path):
    folder = tmp_path / "run"
    # The second time in the run's very last validation; three images at a time it takes its time.
    for epoch in (EPOCH, END):
        life = Life(config, folder)
        assert life.until(lambda life=life, epoch=epoch: life.step >= epoch)
        life.send(signal.SIGUSR1)
        assert life.wait() == [75, 75], life.tail()
        assert steps_saved(folder)[-1] == epoch
        assert epoch not in validated(folder)
    Life(config, folder).finish()
    assert validated(folder) == [EPOCH, END]
    expect_the_same(folder, whole)


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(config, whole, tmp_path):
    """As when a killed launcher has left its ranks behind."""
    folder = tmp_path / "run"
    life = Life(config, folder)
    assert life.until(lambda: life.step >= 3)
    with pytest.raises(MachineError) as refused:
        occupy(folder, patience=0.5)
    assert f"train.run_folder = '{folder}' is in use: process {life.ranks[0].pid} on " in str(refused.value)
    life.finish()
    expect_the_same(folder, whole)
    occupy(folder, patience=0.5).release()


def test_a_signal_in_start_up_ends_it_at_once(config, tmp_path):
    life = Life(config, tmp_path / "run", 2, "train.compile=true")
    assert life.until(lambda: "2 rank(s)" in life.tail())
    time.sleep(1)  # it compiles now, which takes several times as long
    sent = time.monotonic()
    life.send(signal.SIGUSR1)
    assert life.wait() == [75, 75], life.tail()
    assert time.monotonic() - sent < 60
    assert "SIGUSR1 before the first step: nothing to save" in life.tail()


def test_a_finished_run_that_is_started_again_ends_well(config, whole):
    life = Life(config, whole)
    life.finish()
    assert f"{whole} is finished: all {END} steps are done" in life.tail()


def test_a_rank_that_stands_still_ends_the_other_with_its_stacks(config, tmp_path):
    folder = tmp_path / "run"
    life = Life(config, folder, 2, "train.step_timeout=6")
    assert life.until(lambda: life.step >= 3)
    os.kill(life.ranks[1].pid, signal.SIGSTOP)
    life.ranks[0].join(PATIENCE)
    assert life.ranks[0].exitcode == 70, life.tail()
    assert f"rank 0 on {host_name()}: no heartbeat for 6 s in stage 'step' (train.step_timeout)" in life.tail()
    assert "Thread 0x" in (folder / "stacks-rank-0.txt").read_text()
    life.kill()


def test_a_rank_that_never_comes_ends_the_other_in_start_up(config, tmp_path):
    life = Life(config, tmp_path / "run", 2, "train.startup_timeout=8")
    os.kill(life.ranks[1].pid, signal.SIGSTOP)
    life.ranks[0].join(PATIENCE)
    assert life.ranks[0].exitcode == 70, life.tail()
    assert f"rank 0 on {host_name()}: no heartbeat for 8 s in stage 'startup' (train.startup_timeout)" in life.tail()
    life.kill()


@pytest.mark.full  # the meeting alone: training/engine/test_meeting.py
def test_a_port_in_use_ends_the_first_rank_in_a_line_and_the_next_start_trains(config, whole, tmp_path):
    folder = tmp_path / "run"
    with socket.create_server(("", 0)) as taken:
        life = Life(config, folder, environment={"MASTER_PORT": str(taken.getsockname()[1])})
        life.ranks[0].join(PATIENCE)
        assert life.ranks[0].exitcode == 71, life.tail()
        line = f"adaptive train: error: MASTER_PORT = {taken.getsockname()[1]} is in use on {host_name()} by process "
        assert line in life.tail()
        assert "Traceback" not in life.tail()
        life.kill()
    Life(config, folder).finish()
    expect_the_same(folder, whole)


def test_a_killed_rank_ends_the_other_with_an_explanation(config, tmp_path):
    """Also without a launcher that ends it."""
    life = Life(config, tmp_path / "run")
    assert life.until(lambda: life.step >= 3)
    life.send(signal.SIGKILL, 1)
    assert life.wait() == [69, -signal.SIGKILL], life.tail()
    # A worker of the killed rank may complain that nobody takes its batch.
    said = [line for line in life.tail().splitlines() if not line.startswith("[rank1]")]
    assert any(line.startswith("adaptive train: error: another rank ended or cannot be reached") for line in said)
    assert not any("Traceback" in line for line in said), life.tail()


def test_no_memory_says_what_to_change(config, tmp_path):
    overrides = ["data.image_size=96", "train.global_batch=1024", "train.checkpointing=false"]
    life = Life(config, tmp_path / "run", 1, *overrides, memory_gib=0.7)
    assert life.wait() == [1]
    line = next(line for line in life.tail().splitlines() if "out of memory" in line)
    assert line.startswith("adaptive train: error: out of memory on cpu (")
    assert "GiB" in line
    assert "try train.micro_batch=512 (now 1024; the global batch stays), train.checkpointing=true" in line


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 24 MiB: enough for some checkpoints of this network, not for what a test puts beside them."""
    with small_disk(tmp_path / "disk", 24) as folder:
        yield folder


@pytest.mark.full  # one rank on such a disk is in tests/training/checkpoints/test_saver.py
def test_a_disk_that_is_full_for_a_while_costs_nothing(config, whole, full_disk):
    folder = full_disk / "run"
    life = Life(config, folder, 2, "checkpoint.every_steps=5", "checkpoint.max_failed=50")
    assert life.until(lambda: steps_saved(folder) != [])  # nothing is being written that would make room by its end
    filling = fill(full_disk)
    recorded = life.step
    assert life.until(lambda: "failed saves in a row: 1" in life.tail())
    time.sleep(1)
    assert life.step <= recorded + 5  # there is no room for records either: they wait
    filling.unlink()
    life.finish()
    assert any("checkpoint/failed" in record for record in read(folder / "metrics.jsonl"))
    expect_the_same(folder, whole)


@pytest.mark.full
def test_a_disk_that_stays_full_ends_the_run_and_spares_what_is_there(config, full_disk):
    folder = full_disk / "run"
    life = Life(config, folder, 2, "checkpoint.every_steps=5", "checkpoint.max_failed=2")
    assert life.until(lambda: steps_saved(folder) != [])
    kept = steps_saved(folder)[-1]
    filling = fill(full_disk)
    codes = life.wait()
    assert codes[0] == 1, life.tail()
    assert codes[1] != 0
    assert "checkpoint.max_failed = 2 is reached" in life.tail()
    newest = steps_saved(folder)[-1]  # another one may have come to the disk before it was full
    assert newest >= kept
    assert f"step-{newest:08d}" in life.tail()
    filling.unlink()
    Life(config, folder).finish()
    assert steps_saved(folder)[-1] == END


@pytest.mark.full
@pytest.mark.parametrize("failed", [0, 1])  # saves in a row before; one more than that end a run that was not stopped
def test_a_disk_that_is_full_when_a_run_is_stopped_leaves_it_a_stop(failed, config, whole, full_disk):
    folder = full_disk / "run"
    life = Life(config, folder, 2, "checkpoint.every_steps=5", f"checkpoint.max_failed={failed + 1}")
    assert life.until(lambda: steps_saved(folder) != [])
    filling = fill(full_disk)
    assert life.until(lambda: failed == 0 or f"failed saves in a row: {failed}" in life.tail())
    life.send(signal.SIGTERM)
    assert life.wait() == [75, 75], life.tail()
    assert "not saved: " in life.tail()
    assert "No space left on device" in life.tail()
    assert "the same command continues from there" in life.tail()
    filling.unlink()
    Life(config, folder).finish()
    assert steps_saved(folder)[-1] == END
    assert (folder / f"checkpoints/step-{END:08d}/weights.safetensors").read_bytes() == (
        whole / f"checkpoints/step-{END:08d}/weights.safetensors"
    ).read_bytes()
