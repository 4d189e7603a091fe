import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from adaptive.errors import EXIT_INTERRUPTED
from tests.helpers.waiting import PATIENCE

LISTENER = """
import signal, sys, time
from adaptive.training.supervision.signals import StopSignals

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests may have told us to ignore it
signals = StopSignals().listen()
signals.immediate = {immediate}
print("listening", flush=True)
{work}
"""
# A long call in C that holds the main thread: Python's own handlers would run only after it.
BLOCKED = "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire(timeout=120)"
POLLING = """
for _ in range(400):
    time.sleep(0.05)
    if signals.asked:
        print("asked", signals.received.name, flush=True)
        {then}
"""


def start(work, immediate):
    code = textwrap.dedent(LISTENER).format(work=work, immediate=immediate)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "listening\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_before_the_first_step_a_signal_ends_the_process_at_once_even_in_a_long_call(number):
    process = start(BLOCKED, immediate=True)
    sent = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == EXIT_INTERRUPTED == 75
    assert time.monotonic() - sent < 60
    assert (
        errors
        == f"adaptive train: rank 0: {number.name} before the first step: nothing to save, start again to go on\n"
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_later_a_signal_is_only_noted(number):
    process = start(POLLING.format(then="sys.exit(3)"), immediate=False)
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (3, f"asked {number.name}\n")


@pytest.mark.parametrize(("first", "second"), [("SIGUSR1", "SIGTERM"), ("SIGTERM", "SIGTERM")])
def test_a_second_signal_ends_the_process_at_once(first, second):
    process = start(POLLING.format(then="time.sleep(120)"), immediate=False)
    process.send_signal(signal.Signals[first])
    assert process.stdout.readline() == f"asked {first}\n"
    process.send_signal(signal.Signals[second])
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.Signals[second]
    assert f"{second} came after {first}: ended at once" in errors


def test_once_the_work_is_done_signals_are_ignored():
    process = start("signals.ignore(); print('done', flush=True); time.sleep(1); sys.exit(0)", immediate=True)
    assert process.stdout.readline() == "done\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0


def test_other_signals_keep_their_meaning():
    process = start(BLOCKED, immediate=True)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert "KeyboardInterrupt" in errors


def test_the_wish_to_stop_may_come_twice():
    """Slurm signals the tasks, and the batch script that heard it too passes it on."""
    process = start(POLLING.format(then="time.sleep(1); sys.exit(3)"), immediate=False)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked SIGTERM\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 3
