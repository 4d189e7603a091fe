import subprocess
import sys
import textwrap
import time

import pytest

from adaptive.errors import EXIT_HUNG
from adaptive.training.supervision.peers import host_name
from adaptive.training.supervision.watchdog import GRACE
from tests.helpers.waiting import PATIENCE

WATCHED = """
import ctypes, sys, threading, time
from pathlib import Path
from adaptive.training.supervision import watchdog

watchdog.GRACE = 1.0
dog = watchdog.Watchdog(Path(sys.argv[1]), 3, {{"startup": 30, "step": {limit}, "save": 0}}).start("startup")

def a_call_that_never_returns():
    {hang}

{work}
"""


def run(folder, work, hang="threading.Event().wait()", limit=1):
    code = textwrap.dedent(WATCHED).format(work=work, hang=hang, limit=limit)
    started = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=PATIENCE
    )
    return process, time.monotonic() - started


def test_a_hang_ends_the_process_and_leaves_the_stacks(tmp_path):
    process, seconds = run(tmp_path, "dog.heartbeat('step'); a_call_that_never_returns()")
    assert process.returncode == EXIT_HUNG == 70
    assert seconds < 20
    stacks = (tmp_path / "stacks-rank-3.txt").read_text()
    assert "a_call_that_never_returns" in stacks
    assert "Thread 0x" in stacks  # the watchdog's own thread is there as well: all threads are
    line = process.stderr.strip()
    assert line.startswith(f"adaptive train: error: rank 3 on {host_name()}: no heartbeat for 1 s in stage 'step'")
    assert "train.step_timeout" in line
    assert str(tmp_path / "stacks-rank-3.txt") in line


def test_also_where_the_hanging_call_keeps_python_from_running(tmp_path):
    # PyDLL calls a C function without giving Python's lock away: no thread of Python runs any more.
    process, seconds = run(
        tmp_path, "dog.heartbeat('step'); a_call_that_never_returns()", hang="ctypes.PyDLL(None).sleep(120)"
    )
    assert process.returncode == 1
    assert seconds < 100
    assert "Timeout" in process.stderr
    assert "a_call_that_never_returns" in process.stderr


def test_where_the_folder_cannot_be_written_the_stacks_go_to_the_log(tmp_path):
    process, _ = run(tmp_path / "missing", "dog.heartbeat('step'); a_call_that_never_returns()")
    assert process.returncode == EXIT_HUNG
    assert "a_call_that_never_returns" in process.stderr
    assert "in this log" in process.stderr


@pytest.mark.parametrize(
    "work",
    [
        "for _ in range(8): dog.heartbeat('step'); time.sleep(0.4)",
        "dog.heartbeat('save'); time.sleep(2.5)",  # a stage without a limit
        "dog.heartbeat('step'); dog.end(); time.sleep(2.5)",
    ],
)
def test_whoever_lives_is_left_alone(tmp_path, work):
    process, _ = run(tmp_path, work, limit=2)
    assert (process.returncode, process.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_the_fallback_waits_longer_than_the_thread():
    assert GRACE > 5
