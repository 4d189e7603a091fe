"""Errors that a user can mend: each message names the key, file or flag, its value, and the remedy."""

import difflib
import errno
import os
import pwd
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adaptive.foreign_text import redacted, shell_words, shown
from adaptive.foreign_text import visible as one_line  # noqa: F401 - for all that raise or print errors

# What a process ends with besides 0 and 1; schedulers act on these numbers.
EXIT_INTERRUPTED = 75  # asked to stop, saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
EXIT_PEER = 69  # another rank ended or cannot be reached (EX_UNAVAILABLE)
EXIT_HUNG = 70  # ended by the watchdog (EX_SOFTWARE)
EXIT_PASSING = 71  # a fault of the network, a file server or a device that may have passed (EX_OSERR)


def nearest(
    name: str,
    known: Iterable[str],
    otherwise: str = "",
    most: int = 3,
    cutoff: float = 0.6,
    show: Callable[[str], str] = str,
) -> str:
    """Return the remedy for a name that does not exist: the known ones most like it, or else ``otherwise``.

    Args:
        name: as it was given.
        known: what there is.
        otherwise: the remedy where nothing is like it.
        most: names at most.
        cutoff: how alike they have to be, from 0 to 1 (see difflib).
        show: spells a known name in the remedy.
    """
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)
    return f"did you mean {' or '.join(map(show, close))}?" if close else otherwise


def reason_of(error: BaseException | str, longest: int = 300) -> str:
    """Return what a foreign exception says as one line of limited length; its type's name where it says nothing.

    Secrets in it are struck out.
    """
    return redacted(" ".join(str(error).split()))[:longest] or type(error).__name__


class AdaptiveError(Exception):
    """Base of every error that is shown as one line, without a traceback; the process ends with ``exit_code``.

    ``passing`` says whether another start may end differently; None leaves it to what the error was raised for.
    """

    exit_code = 1
    passing: bool | None = None

    def __str__(self) -> str:
        return shown(super().__str__())

    def told(self, command: str, rank: int = 0) -> str:
        """Return the line that a command prints to standard error; empty for none."""
        place = f" (rank {rank} on {socket.gethostname().partition('.')[0]})" if rank else ""
        return f"adaptive {command}: error{place}: {self}"


class ConfigError(AdaptiveError, ValueError):
    """A configuration value is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(AdaptiveError):
    """A dataset, shard, index or image is missing, damaged, or does not fit the configuration."""


class ModelError(AdaptiveError, ValueError):
    """A backbone cannot be built or cut where it was asked to be, or a network's answers are NaN or infinite."""


class CheckpointError(AdaptiveError):
    """A checkpoint is missing, incomplete, damaged, or belongs to another run."""


class TrainingError(AdaptiveError):
    """Training cannot go on: the loss is not finite, or too many steps in a row were skipped."""


class MachineError(AdaptiveError):
    """This machine lacks what the run asks for: a device, disk space, a right, a program."""


class PackageError(MachineError, ImportError):
    """A Python package that is needed is not installed, or cannot be imported."""


class PassingError(MachineError):
    """A fault of the network, a file server or a device that may have passed by the next start."""

    exit_code = EXIT_PASSING
    passing = True


class PeerError(MachineError):
    """Another rank ended or cannot be reached; that rank says why, if it can."""

    exit_code = EXIT_PEER


class SilentHolderError(MachineError):
    """A lock's holder gives no sign of life, and the lock cannot be taken over; another start may find it free."""

    exit_code = EXIT_PEER


class StartError(AdaptiveError):
    """The ranks of one run were started with different configurations, datasets, code, libraries or devices."""


class PolicyError(AdaptiveError, ValueError):
    """A policy file is missing or damaged, belongs to another network, or a budget cannot be met."""


class ExportError(AdaptiveError):
    """A network cannot be exported, or an export folder is incomplete or was changed."""


class UsageError(AdaptiveError):
    """A command was called with words that do not fit together."""

    exit_code = 2


class StoppedError(AdaptiveError):
    """The run was asked to stop and has saved, if the disk had room; the same command continues it."""

    exit_code = EXIT_INTERRUPTED

    def told(self, command: str, rank: int = 0) -> str:
        """Return the line for the first rank; the others stopped with it, and have nothing to add."""
        return f"adaptive {command}: {self}" if rank == 0 else ""


_SHOWN = 100  # characters of a name that is too long
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM)
FAILING = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EREMOTEIO)


@contextmanager
def told_refusals(kind: type[AdaptiveError] = MachineError) -> Iterator[None]:
    """Turn an operating system's refusals, in a block or a decorated function, into errors of this kind."""
    try:
        yield
    except OSError as error:
        known = refusal(error)
        if known is None:
            raise
        raise kind(str(known)) from error


def refusal(error: OSError) -> MachineError | None:
    """Return what an operating system's refusal means to the user, with the remedy; None where it may be our fault."""
    path = str(error.filename) if error.filename is not None else "a file"
    if error.errno in REFUSED:
        return MachineError(f"{path}: {error.strerror}{_whose(path)}")
    if error.errno == errno.ENAMETOOLONG:
        return MachineError(f"{path[:_SHOWN]}...: {error.strerror}; check the path")
    if error.errno in FULL:
        return MachineError(f"{path}: {error.strerror}; free some space, or choose another place, and call again")
    if error.errno == errno.EROFS:
        return MachineError(f"{path}: {error.strerror}; choose another place")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return MachineError(f"{path}: {error.strerror}; allow more, for example ulimit -n 65536, and call again")
    if error.errno in FAILING:
        return MachineError(f"{path}: {error.strerror}; the disk or the file server fails, call again when it works")
    return None


def _whose(path: str) -> str:
    """Return to whom a path belongs that this user may not use, and what that user has to do."""
    for place in (Path(path), *Path(path).parents):
        with suppress(OSError):
            owner = place.stat().st_uid
            if owner == os.geteuid():
                return f"; allow it: chmod -R u+rwX {shell_words(place)}"
            near = place in (Path(path), Path(path).parent)  # what lies further up is not for a run's sake to be opened
            wish = f"chmod -R go+rX {shell_words(place)}" if near else "access"
            who = f"{place} belongs to {_user(owner)}, and this is {_user(os.geteuid())}"
            return f" ({who}); ask for {wish} to read it, and write to a place of your own"
    return "; be a user who may use it"


def _user(number: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return f"user {number}"
