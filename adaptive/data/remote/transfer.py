"""Downloads of single files: several attempts with growing pauses, a time-out, and one line when all failed."""

from __future__ import annotations

import errno
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from fsspec.callbacks import Callback
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter
from tenacity.nap import sleep_using_event

from adaptive.data.faults import CHECKSUM, MISSING, UNREADABLE, BadDataError
from adaptive.errors import DataError, MachineError, reason_of

FIRST_PAUSE = 0.5  # seconds; doubled after every failed attempt, plus up to as much again by chance
LONGEST_PAUSE = 30.0
_POLL = 0.2  # seconds between two checks of a transfer
_RETRIED_STATUS = {408, 425, 429}  # of HTTP, beside the server's errors
# Exceptions of botocore and google.auth, which need not be installed.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
_REASON_LENGTH = 300  # characters of a library's message that are shown
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class Cancelled(Exception):  # noqa: N818 - a request, not an error
    """A transfer was cancelled: its file is not wanted any more."""


class Mismatch(Exception):  # noqa: N818 - becomes a DataError once the attempts are used up
    """A downloaded file is not the one that the index describes."""


@dataclass(frozen=True)
class StartedTransfer(Generic[T]):
    """A transfer that was started: its result, and how to cancel it."""

    future: Future[T]
    stop: Callable[[], object] = lambda: None


class ByteCounter(Callback):
    """Counts the bytes of one file as they arrive, as fsspec reports them, and refuses more than ``limit``."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.total = 0
        self.last = time.monotonic()

    def relative_update(self, inc: int = 1) -> None:
        """Count ``inc`` further bytes (raises Mismatch beyond the limit)."""
        self.last = time.monotonic()
        self.total += inc
        if self.total > self.limit:
            raise Mismatch(f"more than {self.limit} bytes arrive")

    def wait(self, running: StartedTransfer[T], timeout: float, cancel: threading.Event) -> T:
        """Return the transfer's result.

        Raises:
            TimeoutError: no byte arrived for ``timeout`` seconds; the transfer is cancelled.
            Cancelled: ``cancel`` was set.
        """
        while True:
            try:
                return running.future.result(_POLL)
            except NotYet:
                if running.future.done():  # the transfer itself timed out, which raises the same class
                    raise
            if cancel.is_set():
                running.stop()
                raise Cancelled
            if time.monotonic() - self.last > timeout:
                running.stop()
                raise TimeoutError(f"no byte arrived for {timeout:g} s")


@dataclass(frozen=True)
class RemoteFolder(ABC):
    """A folder on another machine, whose files are downloaded one at a time.

    Attributes:
        location: of the folder, as the user wrote it.
        attempts: how often each operation is tried.
        timeout: seconds without a byte after which an attempt has failed.
    """

    location: str
    attempts: int
    timeout: float

    @abstractmethod
    def shown(self, name: str) -> str:
        """Return a file's URL or command for messages, without passwords."""

    @abstractmethod
    def start(self, name: str, path: Path, received: ByteCounter) -> StartedTransfer[Any]:
        """Start writing a file's content to ``path``."""

    @abstractmethod
    def start_size(self, name: str) -> StartedTransfer[int | None]:
        """Start a request for a file's size in bytes; None where it cannot be known without reading it."""

    def close(self) -> None:  # noqa: B027 - not all have something to close
        """Close connections; the next use opens new ones."""

    def reason(self, error: BaseException) -> str:
        """Return why an attempt failed, in one short line."""
        return reason_of(error, _REASON_LENGTH)

    def fetch(self, name: str, path: Path, limit: int, check: Callable[[Path], None], cancel: threading.Event) -> None:
        """Write a file of at most ``limit`` bytes to ``path``; ``check`` raises Mismatch if it is not the right one.

        Raises:
            BadDataError: it does not exist, cannot be read, or is not the right one, after all attempts.
            MachineError: no space for it here.
            Cancelled: ``cancel`` was set.
        """

        def attempt() -> None:
            path.unlink(missing_ok=True)
            received = ByteCounter(limit)
            received.wait(self.start(name, path, received), self.timeout, cancel)
            check(path)

        self._retry(name, attempt, cancel)

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a small file (raises as `fetch` does)."""
        with TemporaryDirectory(prefix="adaptive-") as folder:
            path = Path(folder) / "content"
            self.fetch(name, path, limit, lambda _: None, threading.Event())
            return path.read_bytes()

    def size(self, name: str) -> int | None:
        """Return a file's size in bytes, None where it is not known (raises BadDataError, as `fetch` does)."""
        cancel = threading.Event()
        size = self._retry(name, lambda: ByteCounter(0).wait(self.start_size(name), self.timeout, cancel), cancel)
        return size or None  # servers that make their answers as they go say 0 in advance

    def _retry(self, name: str, attempt: Callable[[], T], cancel: threading.Event) -> T:
        tried = 0
        began = time.monotonic()

        def count(_: RetryCallState) -> None:
            nonlocal tried
            tried += 1

        retrying = Retrying(
            stop=stop_after_attempt(self.attempts),
            wait=wait_exponential_jitter(FIRST_PAUSE, LONGEST_PAUSE, jitter=FIRST_PAUSE),
            retry=retry_if_exception(may_succeed_later),
            sleep=sleep_using_event(cancel),
            before=count,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except (DataError, MachineError, Cancelled):
            raise
        except Exception as error:
            failure = self._failure(name, cause(error), tried, time.monotonic() - began)
            failure.passing = may_succeed_later(error) and not isinstance(error, Mismatch)  # by another start
            raise failure from None

    def _failure(self, name: str, error: BaseException, tried: int, seconds: float) -> DataError | MachineError:
        shown = self.shown(name)
        attempts = f"{tried} attempt{'s' if tried > 1 else ''} in {seconds:.0f} s"
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            return MachineError(f"no space left here for {shown}; free some, or lower data.cache_gib")
        if isinstance(error, FileNotFoundError) or status(error) in (404, 410):
            return BadDataError(f"{shown} does not exist; check data.path, or copy it there", MISSING, whole=True)
        if isinstance(error, Mismatch):
            remedy = "copy it there again or pack again"
            return BadDataError(f"{shown} is not what was packed ({error}; {attempts}); {remedy}", CHECKSUM, whole=True)
        if may_succeed_later(error):
            remedy = f"check the server and the network, or raise data.timeout = {self.timeout:g} or data.attempts"
        else:
            remedy = "check the URL and your right to read it"
        message = f"{shown} cannot be read ({self.reason(error)}; {attempts}); {remedy}"
        return BadDataError(message, UNREADABLE, whole=True)


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run ``work`` in a daemon thread, which does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="transfer", daemon=True).start()
    return future


def cause(error: BaseException) -> BaseException:
    """Return the error behind fsspec's, whose HTTP reports any failure of a size request as a missing file."""
    behind = error.__cause__
    ours = isinstance(behind, OSError) or type(behind).__module__.startswith("aiohttp")
    return behind if isinstance(error, FileNotFoundError) and behind is not None and ours else error


def may_succeed_later(error: BaseException) -> bool:
    """Say whether another attempt may succeed."""
    error = cause(error)
    code = status(error)
    if code is not None:
        return not 400 <= code < 500 or code in _RETRIED_STATUS
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return False
    if type(error).__name__ in _NO_CREDENTIALS:
        return False
    lasting = (
        FileNotFoundError,
        PermissionError,
        ValueError,
        TypeError,
        ImportError,
        DataError,
        MachineError,
        Cancelled,
    )
    return isinstance(error, Exception) and not isinstance(error, lasting) and not str(error).startswith("Forbidden")


def status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of a store's library holds, if it does."""
    for name in ("status", "code"):
        value = getattr(error, name, None)
        if isinstance(value, (int, str)) and str(value).isdecimal():
            return int(value)
    return None
