"""Locks with and without flock: exclusive, ended by the holder's end, taken over from machines that have gone."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive import locks
from adaptive.locks import Lock, LockHeldError
from tests.helpers.noflock import EACH, leave_lease, take_flock_away, without_flock
from tests.helpers.waiting import PATIENCE

HOLDER = """
import sys, time
from pathlib import Path
from adaptive import locks
locks.LEASE, locks.BEAT = 1.0, 0.2
with locks.Lock(Path(sys.argv[1]), lost=print).acquire() as lock:
    print("by lease" if lock.by_lease else "by flock", flush=True)
    sys.stdin.read()
print("released", flush=True)
"""


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "BEAT", 0.2)


@pytest.fixture(params=[pytest.param(None, id="flock"), *EACH])
def number(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """None, or the errno with which flock fails below the test's folder, in this process as well."""
    if request.param is not None:
        take_flock_away(monkeypatch, request.param)
    return request.param


def hold(path: Path, number: int | None) -> subprocess.Popen[str]:
    """Another process, which has the lock when this returns, until its standard input is closed."""
    variables = without_flock(path.parent, number) if number else {}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | variables,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == ("by lease\n" if number else "by flock\n")
    return process


def test_it_is_exclusive_and_free_after_its_holder(tmp_path: Path, number: int | None) -> None:
    holder = hold(tmp_path / "lock", number)
    with pytest.raises(LockHeldError) as refused:
        Lock(tmp_path / "lock").acquire()
    assert not refused.value.silent
    if number:
        assert refused.value.holder == f"process {holder.pid} on {socket.gethostname()}"
    assert holder.communicate(timeout=PATIENCE)[0] == "released\n"
    with Lock(tmp_path / "lock").acquire() as lock:
        assert lock.by_lease == (number is not None)
    assert not (tmp_path / "lock.lease").exists()


def test_a_killed_holder_of_this_machine_is_followed_at_once(tmp_path: Path, number: int | None) -> None:
    holder = hold(tmp_path / "lock", number)
    holder.kill()
    holder.wait()
    began = time.monotonic()
    Lock(tmp_path / "lock").acquire().release()
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("kind", EACH)
def test_a_machine_that_has_gone_is_followed_after_its_silence(
    tmp_path: Path, kind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_flock_away(monkeypatch, kind)
    leave_lease(tmp_path / "lock", monkeypatch)
    began = time.monotonic()
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    taken = []
    while not taken and time.monotonic() - began < PATIENCE:
        taken = [lock for lock in (first, second) if lock.attempt()]
        time.sleep(0.05)
    assert len(taken) == 1  # two that waited: one gets it
    assert 1 <= time.monotonic() - began < 20
    with pytest.raises(LockHeldError, match=r"lock\.lease is held by process \d+ on "):
        Lock(tmp_path / "lock").acquire()
    taken[0].release()


def test_a_lock_that_cannot_be_taken_over_is_named_as_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older version's, which shows no signs of life, or a colleague's in a folder that is not ours."""
    take_flock_away(monkeypatch, errno.ENOSYS)
    (tmp_path / "lock.lease").write_text("17\nnode7\n")
    with pytest.raises(LockHeldError) as refused:
        Lock(tmp_path / "lock").acquire()
    assert refused.value.silent
    assert refused.value.file == tmp_path / "lock.lease"


@pytest.mark.full
def test_a_holder_that_was_suspended_too_long_is_told(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock", errno.ENOSYS)
    # From another machine nothing shows but the silence: this one must not see that the process is there.
    holder.send_signal(signal.SIGSTOP)
    of_other = "import socket; socket.gethostname = lambda: 'node7'\n" + HOLDER
    other = subprocess.run(
        [sys.executable, "-c", of_other, str(tmp_path / "lock")], input="", capture_output=True, text=True,
        env=os.environ | without_flock(tmp_path, errno.ENOSYS), timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert other.stdout == "by lease\nreleased\n"
    holder.send_signal(signal.SIGCONT)
    time.sleep(1)
    assert holder.communicate(timeout=PATIENCE)[0].startswith(f"{tmp_path}/lock.lease is held no more (")


def test_a_mount_without_flock_is_respected_by_one_with_it(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock", errno.ENOSYS)
    with pytest.raises(LockHeldError):
        Lock(tmp_path / "lock").acquire()
    holder.kill()
    holder.wait()
    Lock(tmp_path / "lock").acquire().release()
