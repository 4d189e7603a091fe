"""A rank is slow: the log names it with its node and its ratio, the record holds it, and nobody else is named."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adaptive.tracking.record import read
from adaptive.training.supervision.peers import host_name
from tests.chaos.runs import Life

pytestmark = [pytest.mark.chaos, pytest.mark.ranks, pytest.mark.full]

CONFIG = """
model: {backbone: test_resnet, exits: 2}
data: {path: PATH, image_size: 32, workers: 0}
train: {epochs: 1000, global_batch: 64, device: cpu}
evaluate: {every_epochs: 1000}
checkpoint: {every_epochs: 1000}
tracking: {every_steps: 20, gradient_norms: false, system_seconds: 1}
"""
SLOW = f"warning: rank 1 on {host_name()} is slow, and all ranks wait for it: "
AGAIN = f"rank 1 on {host_name()} keeps up again: "


@contextmanager
def throttled(pid: int, share: float = 0.8, period: float = 0.5) -> Iterator[None]:
    """Stop a process for a share of the time, as a node does that has too much else to do."""
    over = threading.Event()

    def run() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(share * period)
            os.kill(pid, signal.SIGCONT)
            over.wait((1 - share) * period)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_rank_that_stands_still_most_of_the_time_is_named(digits: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.replace("PATH", str(digits)))
    life = Life(config, tmp_path / "run")
    try:
        assert life.until(lambda: life.step >= 100), life.tail()
        time.sleep(15)
        assert "is slow" not in life.tail()
        with throttled(life.ranks[1].pid):
            assert life.until(lambda: SLOW in life.tail()), life.tail()
            time.sleep(5)
        assert life.until(lambda: AGAIN in life.tail()), life.tail()
    finally:
        life.kill()
    log = life.tail()
    assert log.count("is slow") == log.count(SLOW) == log.count(AGAIN) == 1
    ratio = float(re.search(r"wait for it: ([0-9.]+) x the median rank's own time \(compute", log)[1])
    assert 2 < ratio < 12
    records = [one for one in read(life.folder / "metrics.jsonl") if "ranks/slowest" in one]
    worst = max(records, key=lambda one: one["ranks/slowest_ratio"])
    assert (worst["ranks/slowest"], worst["ranks/slowest_node"]) == (1, host_name())
    assert worst["ranks/slowest_ratio"] >= 2
    assert worst["ranks/slowest_compute_seconds"] > 2 * worst["ranks/median_compute_seconds"]
    assert min(one["ranks/slowest_ratio"] for one in records) < 1.5
