"""Which faults pass by themselves: the one place that tells them from mistakes that another start would meet again.

A file server that answers late, a name that is not known yet, a port that the run before still holds, a node that comes
late: first tried again here, within a bound; then told in one line, with an exit code after which schedulers start the
same command again (`EXIT_PASSING`). Full disks and missing files or rights are none of them.
"""

from __future__ import annotations

import errno
import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from adaptive.errors import EXIT_PASSING, AdaptiveError, PassingError, reason_of

LOGGER = logging.getLogger(__name__)
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds between attempts; doubled
PATIENCE = 60.0  # seconds; file servers fail over within that

FILE_SERVER = {
    errno.EIO, errno.ESTALE, errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.EREMOTEIO, errno.ENOTCONN, errno.ESHUTDOWN,
    errno.ENOLINK, errno.ECOMM, errno.EPROTO, errno.ENXIO, errno.ENODEV, errno.ENFILE,
}  # fmt: skip
NETWORK = {
    errno.ETIMEDOUT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
    errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EADDRINUSE, errno.EADDRNOTAVAIL,
    errno.ENOBUFS,
}  # fmt: skip
NAMES = {socket.EAI_AGAIN, socket.EAI_NONAME, socket.EAI_FAIL, socket.EAI_NODATA, socket.EAI_SYSTEM}
# How torch, gloo, NCCL and the CUDA driver say the same, in exceptions without a number.
WORDS = re.compile(
    r"EADDRINUSE|EADDRNOTAVAIL|address already in use|ECONNRE|connection (refused|reset|closed)|broken pipe"
    r"|no route to host|(network|host) is (down|unreachable)|connect(ion)? time[d-]? ?out|socket has (timed out|failed)"
    r"|timed out (after|waiting)|connectFullMesh|gai error|cannot be retrieved|temporary failure in name resolution"
    r"|stale (nfs )?file handle|input/output error|transport endpoint"
    r"|ncclSystemError|ncclRemoteError|unhandled system error|remote process exited"
    r"|devices? (is|are|\(s\) is/are) busy|busy or unavailable|system not yet initialized",
    re.IGNORECASE,
)

T = TypeVar("T")


def passing(error: BaseException) -> bool:
    """Tell whether a fault, or what it was raised for, may have passed by another start of the same command."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        verdict = _verdict(cause)
        if verdict is not None:
            return verdict
        cause = cause.__cause__ or cause.__context__
    return False


def exit_code_of(error: BaseException) -> int:
    """Return the code with which a process ends because of an error."""
    code = error.exit_code if isinstance(error, AdaptiveError) else 1
    return EXIT_PASSING if code == 1 and passing(error) else code


def told(error: BaseException) -> PassingError:
    """Return the error with which a passing fault that nobody foresaw is told."""
    return PassingError(
        f"{reason_of(error)} [{type(error).__name__}]: the file system, the network or a device failed for a moment; "
        "the same command, started again, goes on from the newest checkpoint"
    )


def patiently(attempt: Callable[[], T], what: str | Path, patience: float | None = None) -> T:
    """Return what a short operation on files returns; passing faults are tried again, with growing pauses.

    Args:
        attempt: the operation; it must be one that may be repeated.
        what: the file, for the warning.
        patience: seconds after which the fault is raised as it is; by default PATIENCE.
    """
    limit, pause = time.monotonic() + (PATIENCE if patience is None else patience), FIRST_PAUSE
    while True:
        try:
            return attempt()
        except OSError as error:
            if not passing(error) or time.monotonic() + pause > limit:
                raise
            LOGGER.warning("%s: %s; trying again for up to %.0f s", what, reason_of(error), limit - time.monotonic())
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


def _verdict(error: BaseException) -> bool | None:
    """Judge one exception by itself; None where it says nothing of its cause."""
    if isinstance(error, AdaptiveError):
        return error.passing
    if isinstance(error, socket.gaierror):
        return error.errno in NAMES
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FILE_SERVER | NETWORK
    if isinstance(error, TimeoutError | ConnectionError):
        return True
    if isinstance(error, RuntimeError) and WORDS.search(str(error)):
        return True
    return None
