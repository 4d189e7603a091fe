"""Locks between processes, on one machine or many: `flock` where the file system has it, else a lease.

The kernel, or the file server, ends a `flock` with its holder. Some mounts of Lustre, NFS and FUSE have none. There a
holder keeps a file ``NAME.lease`` beside the lock and refreshes it. One that has ended is recognised at once on its own
machine (by process, start and boot), and on others by silence, timed by the clock of who waits. filelock makes both.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from adaptive.foreign_text import visible

# What flock says where there is none: Lustre without -o flock, NFS without a lock server, FUSE.
NO_FLOCK = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
# Seconds of silence after which a lease's holder has gone; NFS may show a file as it was a minute ago. All who share a
# file system have to agree on them.
LEASE = 90.0
BEAT = 15.0
FOR_EVER = -1.0
LOCK = "lock"  # of a workshop
_POLL = 0.1  # seconds between two attempts, which for a lease each read a file of the server's
_POLL_LEASE = 0.5
_MOMENT = 3.0
_ATTEMPTS = 100
_FIRST_NAMESPACE = 0xEFFFFFFC  # the machine's own: PROC_PID_INIT_INO of Linux


class LockHeldError(Exception):
    """Somebody else holds a lock.

    Attributes:
        file: whose removal frees it, should its holder have gone.
        holder: for example ``process 17 on node3``; empty where the file does not tell.
        silent: the holder gave no sign of life for as long as a living one could be silent.
    """

    def __init__(self, file: Path, holder: str, silent: bool) -> None:
        super().__init__(f"{file} is held by {holder or 'another process'}")
        self.file, self.holder, self.silent = file, holder, silent


class Lock:
    """An exclusive lock; released by `release`, or by the end of the process, however it ends.

    Args:
        path: its file, which stays.
        lost: called in another thread, with the reason, should a lease be lost while it is held: who was suspended, or
            cut off from the file server, for longer than LEASE has to stop.
    """

    def __init__(self, path: Path, lost: Callable[[str], None] | None = None) -> None:
        self.path = path
        self.lost = ""  # why a lease that was held is held no more
        self._on_lost = lost
        self._flock = FileLock(path, thread_local=False, fallback_to_soft=False)
        self._lease = SoftFileLease(
            f"{path}.lease",
            lease_duration=LEASE,
            heartbeat_interval=BEAT,
            on_compromise=self._compromised,
            thread_local=False,
        )

    @property
    def by_lease(self) -> bool:
        """Whether it is held by a lease, for want of flock."""
        return self._lease.is_locked

    def attempt(self) -> bool:
        """Take the lock if it is free, and say whether it was (raises OSError)."""
        try:
            self._flock.acquire(blocking=False)
        except Timeout:
            return False
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
        # A machine whose mount lacks what ours has may hold a lease.
        if self._flock.is_locked and not Path(self._lease.lock_file).exists():
            return True
        try:
            self._lease.acquire(blocking=False)
        except (Timeout, LeaseSettingsMismatch):  # of a version that waits for another time
            self._flock.release()
            return False
        return True

    def acquire(self, patience: float = 0.0, tell: Callable[[str], None] | None = None) -> Self:
        """Take the lock, waiting up to ``patience`` seconds, or FOR_EVER, for a living holder to release it.

        Whether the holder of a lease on another machine lives is waited for: up to LEASE, if it has gone. ``tell`` is
        called with the holder, once, when waiting takes longer than a moment.

        Raises:
            LockHeldError: somebody else holds it.
            OSError: its file cannot be written.
        """
        began = time.monotonic()
        first = self._stamp()
        while not self.attempt():
            passed = time.monotonic() - began
            stamp = self._stamp()
            silent = stamp is not None and stamp == first and not self._holder_is_here()
            if 0 <= patience <= passed and (not silent or passed > LEASE + BEAT):
                raise LockHeldError(self._file(stamp), self._holder(), silent)
            if tell is not None and passed > _MOMENT:
                tell(self._holder())
                tell = None
            time.sleep(_POLL if stamp is None else _POLL_LEASE)
        return self

    def release(self) -> None:
        """Release the lock, if it is held."""
        self._lease.release()
        self._flock.release()

    def remove(self) -> None:
        """Release the lock and remove its file, for a folder that is to vanish; who waits takes a new one."""
        self.path.unlink(missing_ok=True)
        self.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _stamp(self) -> tuple[int, int] | None:
        """Return what changes with every sign of life of a lease's holder; None without a lease."""
        try:
            found = Path(self._lease.lock_file).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _file(self, stamp: tuple[int, int] | None) -> Path:
        return self.path if stamp is None else Path(self._lease.lock_file)

    def _holder(self) -> str:
        owner = self._lease.owner
        return visible(f"process {owner.pid} on {owner.hostname.partition('?')[0]}") if owner else ""

    def _holder_is_here(self) -> bool:
        """Whether a lease's holder is of this machine; it lives then, or the attempt would have succeeded."""
        owner = self._lease.owner
        return owner is not None and owner.hostname == _host()

    def _compromised(self, loss: LeaseCompromise) -> None:
        self.lost = f"{loss.lock_file} is held no more ({loss.reason.replace('-', ' ')})"
        if self._on_lost is not None:
            self._on_lost(self.lost)


@contextmanager
def workshop(folder: Path, parents: bool = True) -> Iterator[Lock]:
    """Hold a folder for one process at a time, made if needed: for what is written aside and published by a rename.

    What a killed process left in it is still there. At the end the folder goes, if nothing is in it. With ``parents``
    the folders above it are made as well.

    Raises:
        LockHeldError: another process has it.
        OSError: it cannot be made.
    """
    for _ in range(_ATTEMPTS):
        folder.mkdir(parents=parents, exist_ok=True)
        try:
            lock = Lock(folder / LOCK).acquire()
            break
        except FileNotFoundError:  # its last holder has removed it just now
            continue
    else:
        raise LockHeldError(folder / LOCK, "", False)
    try:
        yield lock
    finally:
        with suppress(OSError):
            if contents(folder):
                lock.release()
            else:
                lock.remove()
                folder.rmdir()  # unless somebody else has it by now


def contents(folder: Path) -> list[Path]:
    """Return what lies in a `workshop`."""
    return [path for path in folder.iterdir() if path.name not in (LOCK, f"{LOCK}.lease")]


def _host() -> str:
    """Return this machine's name as filelock records it: with the namespace of this process's number, if it has one."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = _FIRST_NAMESPACE
    return socket.gethostname() + (f"?pidns-{namespace:x}" if namespace != _FIRST_NAMESPACE else "")
