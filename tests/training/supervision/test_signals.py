import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from adaptive.errors import EXIT_INTERRUPTED
from adaptive.training.supervision.signals import StopSignals
from tests.helpers.waiting import PATIENCE

LISTENER = """
import signal, sys, time
from adaptive.training.supervision.signals import StopSignals

# Whoever starts the tests may have told us to ignore these: a shell in the background, nohup.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
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


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
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


def test_the_wish_to_stop_may_come_twice():
    """Slurm signals the tasks, and the batch script that heard it too passes it on."""
    process = start(POLLING.format(then="time.sleep(1); sys.exit(3)"), immediate=False)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked SIGTERM\n"
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(PATIENCE) == 3


@pytest.mark.parametrize(
    "heard",
    [
        ("SIGINT", "SIGTERM"),  # the deepspeed launcher, which the terminal's Ctrl-C reaches as well
        ("SIGINT", "SIGINT"),  # torchrun passes on what its ranks have from the terminal
        ("SIGHUP", "SIGHUP"),  # of the kernel and of the shell that ends
        ("SIGHUP", "SIGTERM"),  # and of who ends what a session has left
        ("SIGTERM", "SIGHUP"),
        ("SIGINT", "SIGHUP", "SIGUSR1", "SIGTERM"),
    ],
)
def test_one_wish_that_comes_by_several_ways_saves(heard):
    process = start(POLLING.format(then="time.sleep(1); sys.exit(3)"), immediate=False)
    process.send_signal(signal.Signals[heard[0]])
    assert process.stdout.readline() == f"asked {heard[0]}\n"
    for name in heard[1:]:
        process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (3, "")


@pytest.mark.parametrize(("first", "second"), [("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT"), ("SIGHUP", "SIGINT")])
def test_ctrl_c_once_more_ends_the_process_at_once(first, second):
    process = start(
        "import adaptive.training.supervision.signals as s; s.PASSED_ON = 0.2" + POLLING.format(then="time.sleep(120)"),
        immediate=False,
    )
    process.send_signal(signal.Signals[first])
    assert process.stdout.readline() == f"asked {first}\n"
    time.sleep(0.4)  # a human needs longer than a launcher
    process.send_signal(signal.Signals[second])
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert f"{second} came after {first}: ended at once" in errors


def test_a_launcher_passes_on_once():
    """Two SIGTERM after Ctrl-C are of somebody who means it."""
    process = start(POLLING.format(then="time.sleep(120)"), immediate=False)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked SIGINT\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)  # two that are pending at once are one
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 143


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_at_the_start_stays_ignored(number):
    """As nohup does with a hangup, and a shell without job control with Ctrl-C for what runs in the background."""
    signals = StopSignals()
    before = signal.signal(number, signal.SIG_IGN)
    try:
        signals.listen()
        assert signal.getsignal(number) is signal.SIG_IGN
        os.kill(os.getpid(), number)
        time.sleep(0.2)
        assert not signals.asked
        signals.restore()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
