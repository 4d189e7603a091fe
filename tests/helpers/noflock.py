"""File systems without flock: a preloaded library takes it away below a folder, with an errno of choice."""

import errno
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest
from filelock import SoftFileLease

from adaptive import locks

ERRNOS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]
# For tests that take a second or so with each: all of them in the full set.
EACH = [
    pytest.param(number, id=errno.errorcode[number], marks=[pytest.mark.full] if number != errno.ENOLCK else [])
    for number in ERRNOS
]


@cache
def _library() -> str:
    # gcc is there: DeepSpeed compiles its operators with it.
    library = Path(tempfile.mkdtemp(prefix="noflock-")) / "noflock.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return str(library)


def without_flock(folder: Path, number: int) -> dict[str, str]:
    """Environment variables of a process for which nothing below ``folder`` can be locked."""
    return {"LD_PRELOAD": _library(), "FLOCK_UNDER": str(folder.resolve()), "FLOCK_ERRNO": str(number)}


def take_flock_away(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let flock fail in this process, into which no library can be preloaded any more."""

    def none(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", none)


def leave_lease(path: Path, monkeypatch: pytest.MonkeyPatch, host: str = "node7") -> None:
    """Leave the lease of a lock's file as a process of another machine does that loses power."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with monkeypatch.context() as patched:
        patched.setattr("socket.gethostname", lambda: host)
        lease = SoftFileLease(f"{path}.lease", lease_duration=locks.LEASE, heartbeat_interval=0.9 * locks.LEASE)
        lease.acquire()
    content = Path(f"{path}.lease").read_bytes()
    lease.release()
    Path(f"{path}.lease").write_bytes(content)
