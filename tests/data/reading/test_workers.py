"""Data workers that are closed, signalled, killed, or that hang: with Python's lock held, as a fork can leave them."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from adaptive.config.sections import DataConfig
from adaptive.data.images import transforms
from adaptive.data.images.decode import decode_image
from adaptive.data.reading import pipeline, workers
from adaptive.data.reading.stream import EvaluationStream, LoaderOptions, TrainStream
from adaptive.data.shards.index import load_index
from adaptive.errors import MachineError
from tests.helpers.waiting import PATIENCE, wait_until

# More workers than this machine has cores are what some of these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def train(folder, count):
    data = DataConfig(path=str(folder), image_size=8, crop="pad", crop_padding=1, erasing=0.3, shuffle_window=2)
    loader = LoaderOptions(workers=count)
    return TrainStream(load_index(folder), data, "train", loader, seed=5, global_batch=48, micro_batch=16)


def evaluation(folder, count):
    data = DataConfig(path=str(folder), image_size=8)
    return EvaluationStream(load_index(folder), data, "val", LoaderOptions(workers=count), batch=32)


def processes():
    return {p.pid for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE}


def same(found, expected):
    return len(found) == len(expected) and all(
        torch.equal(a, b) for pair in zip(found, expected, strict=True) for a, b in zip(*pair, strict=True)
    )


def hang():
    """Sleep for ever with Python's lock, like a call in C that waits for what nobody will give."""
    wait = ctypes.PyDLL(None).pause
    while True:
        wait()


@pytest.fixture
def hanging(monkeypatch, tmp_path):
    """Makes worker processes hang at their so many-th image, one for each time given; all is watched more closely."""
    monkeypatch.setattr(workers, "HEARTBEAT_EVERY", 0.1)
    monkeypatch.setattr(workers, "CHECK_EVERY", 0.5)
    monkeypatch.setattr(workers, "MISSED_CHECKS", 6)
    here = os.getpid()

    def at(image, times):
        for time_ in range(times):
            (tmp_path / str(time_)).touch()
        met = 0

        def decode(data):
            nonlocal met
            met += 1
            if met == image and os.getpid() != here:
                for path in tmp_path.iterdir():
                    try:
                        path.unlink()
                    except FileNotFoundError:
                        continue  # another worker's
                    hang()
            return decode_image(data)

        for module in (transforms, pipeline):  # training's images and evaluation's
            monkeypatch.setattr(module, "decode_image", decode)

    return at


def test_closing_early_ends_the_workers(digits):
    before = processes()
    batches = train(digits, 3).batches(0, 10_000)
    next(batches)
    assert len(processes() - before) == 3
    batches.close()
    assert processes() == before


def test_workers_leave_signals_to_the_parent(digits):
    before = processes()
    batches = train(digits, 2).batches(0, 40)
    for _ in range(6):  # each worker has made some, and so has come to its work
        next(batches)
    pids = [str(pid) for pid in processes() - before]
    for name in ("INT", "USR1", "USR2", "TERM"):
        subprocess.run(["kill", f"-{name}", *pids], check=True)
    assert len(list(batches)) == 114


def test_a_killed_worker_is_named_with_a_remedy(digits):
    before = processes()
    batches = train(digits, 2).batches(0, 10_000)
    next(batches)
    os.kill((processes() - before).pop(), signal.SIGKILL)
    with pytest.raises(MachineError, match=r"data worker died.*data\.workers"):
        list(batches)
    assert processes() == before


@pytest.mark.parametrize("image", [1, 40])  # before the first batch, and after it
def test_a_worker_that_hangs_is_replaced_and_nothing_is_lost(digits, hanging, caplog, image):
    before = processes()
    expected = list(train(digits, 0).batches(3, 9)), list(evaluation(digits, 0))
    hanging(image, times=1)
    found = []
    with caplog.at_level(logging.WARNING):
        found.append(list(train(digits, 2).batches(3, 9)))
    [said] = caplog.messages
    assert said.startswith("data worker ")
    assert "sent no heartbeat for 3 s, S (sleeping)" in said
    assert said.endswith(": the workers are started again, and nothing is lost")
    hanging(image, times=2)  # both at once: one is replaced with the other
    found.append(list(evaluation(digits, 2)))
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])
    assert processes() == before


def test_workers_that_hang_one_after_the_other_end_the_run_with_a_remedy(digits, hanging):
    before = processes()
    hanging(1, times=100)
    with pytest.raises(MachineError, match=r"no heartbeat.*like 3 before it; data\.workers=0 does without them"):
        list(evaluation(digits, 1))
    assert processes() == before


def test_a_worker_that_hangs_while_the_rank_computes_harms_nobody(digits, hanging):
    """Its end would be an exception in the middle of a step; it waits until its batch is needed."""
    expected = list(train(digits, 0).batches(0, 3))
    hanging(40, times=1)
    batches = train(digits, 1).batches(0, 3)
    found = [next(batches)]
    until = time.monotonic() + 6
    while time.monotonic() < until:
        time.sleep(0.1)
    assert same(found + list(batches), expected)


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionResetError(), RuntimeError("DataLoader worker (pid 1) exited")]
)
def test_the_signal_of_a_workers_end_may_come_while_its_broken_connection_is_explained(error, monkeypatch):
    """The loader's handler of SIGCHLD raises in the main thread, wherever it is."""
    explain, signals = workers._Workers._explain, [2]

    def interrupted(self, error):
        if signals[0]:
            signals[0] -= 1
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
        return explain(self, error)

    def items():
        raise error
        yield

    monkeypatch.setattr(workers, "CHECK_EVERY", 0.05)
    monkeypatch.setattr(workers._Workers, "_explain", interrupted)
    with pytest.raises(MachineError, match=r"a data worker died"):
        workers._Workers(1).next_of(items())


def test_workers_end_where_an_errors_traceback_keeps_their_loader(digits, hanging, monkeypatch):
    """As hooks for exceptions that nobody catches, and debuggers, keep them."""
    before, explain, kept = processes(), workers._Workers._explain, []
    expected = list(train(digits, 0).batches(3, 9))
    hanging(40, times=1)
    monkeypatch.setattr(workers._Workers, "_explain", lambda self, error: kept.append(error) or explain(self, error))
    assert same(list(train(digits, 2).batches(3, 9)), expected)
    assert kept
    assert processes() == before


def test_closing_ends_a_worker_that_hangs(digits, hanging):
    before = processes()
    hanging(40, times=1)
    batches = train(digits, 1).batches(0, 100)
    next(batches)
    time.sleep(1)
    batches.close()
    assert processes() == before


DEAF = """
import os, sys, time
from pathlib import Path
from adaptive.data.images import transforms
from tests.data.reading.test_workers import hang, train

def decode(data):
    Path(sys.argv[2]).write_text(str(os.getpid()))
    os.rename(sys.argv[2], sys.argv[3])
    hang()

transforms.decode_image = decode
next(train(Path(sys.argv[1]), 1).batches(0, 100))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_worker_that_hangs_ends_with_its_killed_parent(digits, tmp_path):
    written, told = tmp_path / "written", tmp_path / "told"
    parent = subprocess.Popen([sys.executable, "-c", DEAF, str(digits), str(written), str(told)])
    wait_until(lambda: told.exists() or parent.poll() is not None)
    assert parent.poll() is None
    worker = psutil.Process(int(told.read_text()))
    parent.kill()
    parent.wait()
    gone, _ = psutil.wait_procs([worker], timeout=PATIENCE)
    assert gone or worker.status() == psutil.STATUS_ZOMBIE


def test_every_worker_has_a_heartbeat_of_its_own(digits, monkeypatch):
    monkeypatch.setattr(workers, "HEARTBEAT_EVERY", 0.01)
    started = []
    create = workers._Workers.__init__

    def remember(self, count):
        create(self, count)
        started.append(self)

    monkeypatch.setattr(workers._Workers, "__init__", remember)
    batches = train(digits, 3).batches(0, 10_000)
    next(batches)
    [pool] = started
    before, until = pool._heartbeats[:], time.monotonic() + 60
    while any(old == new for old, new in zip(before, pool._heartbeats[:], strict=True)):
        assert time.monotonic() < until, "a worker has no heartbeat"
        time.sleep(0.01)
    batches.close()
