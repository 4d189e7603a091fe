"""The operators that DeepSpeed compiles at its first start, and the locks that a kill in that moment leaves behind.

torch before 2.15 guards a compilation by a file that the compiling process removes when it is done. Killed before, it
leaves the file, and every later start would wait for it, for ever and in silence. Later versions lock the file itself,
which ends with the process, and leave it lying.
"""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import os
import secrets
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil

from adaptive.errors import MachineError, reason_of
from adaptive.locks import NO_FLOCK

OPERATOR = "deepspeed_shm_comm"
LOGGER = logging.getLogger(__name__)
LONGEST = 900.0  # seconds that a compilation may take, on another machine that shares the folder
LockState = Literal["free", "held", "left", "young"]


def free_operators() -> None:
    """Remove locks of compilations that were killed; say so, and also where one is under way."""
    try:
        folder = operator_folder()
    except OSError:
        return  # a GPU needs none, and on CPUs `check_operator_folder` has said so
    for lock in folder.glob("deepspeed_*/lock"):
        state, age = lock_state(lock), lock_age(lock) or 0.0
        if state == "left":
            if _remove(lock):
                LOGGER.warning("removed %s: the compilation that it guarded was killed %.0f s ago", lock, age)
        elif state == "held":
            LOGGER.warning("another process compiles DeepSpeed's operator (%s); waiting for it", lock)
        elif state == "young":
            LOGGER.warning(
                "another process compiles DeepSpeed's operator since %.0f s, which is waited for; if there is none (it "
                "was killed), remove %s",
                age,
                lock,
            )


def _remove(lock: Path) -> bool:
    """Remove an old lock, and say whether it was one; what another start has locked anew since it was judged stays."""
    taken = lock.with_name(f".{lock.name}.{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        lock.rename(taken)  # of two starts one gets it
        old = (lock_age(taken) or 0.0) > LONGEST
        if not old:
            with suppress(FileExistsError):
                os.link(taken, lock)
        taken.unlink()
        return old
    return False


def check_operator_folder() -> None:
    """Refuse a start on CPUs where DeepSpeed could not compile its operator (raises MachineError).

    That holds also where it is compiled: torch writes a lock and its notes beside it at every start.
    """
    blocked, reason = "", ""
    try:
        folder = operator_folder()
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / OPERATOR
        needed = (path for path in (folder, built, built / "lock", built / "build.ninja") if path.exists())
        blocked = next((str(path) for path in needed if not os.access(path, os.W_OK)), "")
        reason = "Permission denied"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        blocked, reason = str(getattr(error, "filename", None) or "the home folder"), reason_of(error)
        reason = getattr(error, "strerror", None) or reason
    if blocked:
        named = os.environ.get("TORCH_EXTENSIONS_DIR")
        raise MachineError(
            f"TORCH_EXTENSIONS_DIR {f'= {named!r}' if named else 'is not set'}, and {blocked} cannot be written: "
            f"{reason}; DeepSpeed compiles an operator there: name a folder of your own, "
            "export TORCH_EXTENSIONS_DIR=FOLDER"
        )


def lock_state(lock: Path) -> LockState:
    """Tell what a lock means: ``free`` nothing, ``held`` a compilation, ``left`` by a killed one, ``young`` either."""
    try:
        with lock.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return "free"
    except OSError as error:
        if error.errno not in NO_FLOCK:  # without flock, the file itself has to tell
            return "held"
    age = lock_age(lock)
    if age is None or not _existence_locks():
        return "free"
    if held_here(lock):
        return "held"
    return "left" if age > LONGEST else "young"


def _existence_locks() -> bool:
    """Whether this torch takes a file's mere existence for a lock (before 2.15)."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    source = Path(found.origin).parent / "utils" / "cpp_extension.py"
    return source.is_file() and "FileBaton(" in source.read_text(encoding="utf-8", errors="replace")


def operator_folder() -> Path:
    """Return the folder that holds a folder for each operator (TORCH_EXTENSIONS_DIR, or below torch's default)."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(OPERATOR, verbose=False)).parent


def lock_age(lock: Path) -> float | None:
    """Return the seconds since a lock was made; None where it has gone."""
    try:
        return max(time.time() - lock.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return None


def held_here(lock: Path) -> bool:
    """Tell whether a process of this machine holds the lock open, as far as this user may see."""
    wanted = lock.resolve()
    for process in psutil.process_iter():
        try:
            if any(Path(file.path) == wanted for file in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False
