"""The phases of a start add up to the time since the process began, and are told once."""

from __future__ import annotations

import re
import time
from pathlib import Path

import psutil
import pytest

from adaptive.training.supervision.start_clock import StartClock
from tests.helpers.commands import Forks


def test_phases_add_up_and_are_told_once() -> None:
    clock, began = StartClock(), time.monotonic()
    for phase in ("dataset", "network", "dataset"):
        time.sleep(0.02)
        clock.done(phase)
    line = clock.finish()
    assert list(clock.seconds) == ["dataset", "network", "first step"]
    assert clock.seconds["dataset"] >= 0.04
    assert sum(clock.seconds.values()) == pytest.approx(time.monotonic() - began, abs=0.05)
    assert re.fullmatch(r"start took 0\.\d s on this rank: dataset 0\.\d, network 0\.\d, first step 0\.\d", str(line))
    clock.done("network")
    assert clock.finish() is None
    assert len(clock.seconds) == 3


def test_it_counts_from_the_beginning_of_the_process() -> None:
    clock = StartClock(process=True)
    clock.done("imports")
    assert clock.seconds["imports"] == pytest.approx(time.time() - psutil.Process().create_time(), abs=1)


@pytest.mark.full
@pytest.mark.end_to_end
def test_a_run_tells_how_long_its_start_took(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    ended = forks.run(["train", str(config_file), f"train.run_folder={tmp_path / 'run'}"])
    assert ended.code == 0, ended
    phases = ("imports", "dataset", "network", "checks", "meeting", "checkpoint", "data", "records", "engine")
    numbers = ", ".join(rf"{phase} \d+\.\d" for phase in (*phases, "first step"))
    assert len(re.findall(rf"start took \d+\.\d s on this rank: {numbers}", ended.out)) == 1
