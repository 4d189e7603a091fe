"""Checks of the file system that runs are written to: space, speed, atomic renames, locks, its clock."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from adaptive.doctor.finding import Check, CheckSettings, Finding, error, ok, warning
from adaptive.errors import MachineError
from adaptive.files import sync_folder
from adaptive.foreign_text import shell_words

MIB, GIB = 2**20, 2**30
WRITTEN = 32 * MIB
SKEW = 2.0  # seconds
ELSEWHERE = "adaptive train CONFIG train.run_folder=/a/folder/you/may/write"


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists: a check makes none that is missing."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


@contextmanager
def scratch(settings: CheckSettings) -> Iterator[Path]:
    """Yield a folder on the run folder's file system that is gone afterwards.

    Raises:
        MachineError: nothing can be written there.
    """
    around = existing(settings.run_folder)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".adaptive-doctor-", dir=around))
    except OSError as problem:
        raise MachineError(f"{around} cannot be written: {problem.strerror}; {ELSEWHERE}") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def space(settings: CheckSettings) -> Finding:
    """Check how many bytes and files are free."""
    folder = existing(settings.run_folder)
    total, _, free = shutil.disk_usage(folder)
    files = os.statvfs(folder)
    shown = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free in {folder}"
    remedy = f"df -h {shell_words(folder)}   # free some, or {ELSEWHERE}"
    if free < 200 * MIB:
        return error(f"only {free / MIB:.0f} MiB free in {folder}; checkpoints do not fit", remedy)
    if files.f_files and files.f_favail < 1000:
        return error(
            f"only {files.f_favail} more files fit in {folder}", f"df -i {shell_words(folder)}   # remove some"
        )
    return warning(shown, remedy) if free < 5 * GIB else ok(shown)


def writing(settings: CheckSettings) -> Finding:
    """Check the speed of writing with fsync, as checkpoints are written."""
    folder = existing(settings.run_folder)
    if shutil.disk_usage(folder).free < 2 * WRITTEN:
        return error(
            f"no space in {folder} to write {WRITTEN // MIB} MiB", f"df -h {shell_words(folder)}   # or {ELSEWHERE}"
        )
    block = os.urandom(MIB)  # some file systems compress
    with scratch(settings) as here:
        began = time.perf_counter()
        with (here / "written").open("wb") as file:
            for _ in range(WRITTEN // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        speed = WRITTEN / (time.perf_counter() - began)
    shown = f"{speed / MIB:.0f} MiB/s written with fsync to {folder}"
    return ok(shown) if speed > 20 * MIB else warning(f"only {shown}; saving takes long", ELSEWHERE)


def renames(settings: CheckSettings) -> Finding:
    """Check renaming over a file, and of a folder, by which checkpoints are published."""
    with scratch(settings) as here:
        (here / "old").write_text("old")
        (here / "new").write_text("new")
        (here / "new").replace(here / "old")
        (here / "folder").mkdir()
        (here / "folder").rename(here / "renamed")
        sync_folder(here)
        whole = (here / "old").read_text() == "new" and not (here / "new").exists() and (here / "renamed").is_dir()
    if not whole:
        return error(f"renaming is not atomic in {existing(settings.run_folder)}", ELSEWHERE)
    return ok("files and folders are replaced by renaming")


def locks(settings: CheckSettings) -> Finding:
    """Check file locks, which keep two runs out of one folder."""
    with scratch(settings) as here:
        first, second = FileLock(here / "lock"), FileLock(here / "lock", timeout=0)
        try:
            with first:
                try:
                    with second:
                        return error(f"{existing(settings.run_folder)} gives one lock twice", ELSEWHERE)
                except Timeout:
                    return ok("a lock is given once")
        except (NotImplementedError, OSError) as problem:
            found = f"no file locks in {existing(settings.run_folder)} ({problem})"
            return warning(f"{found}: two runs in one folder would not notice each other", ELSEWHERE)


def clock(settings: CheckSettings) -> Finding:
    """Check this machine's clock against the file server's."""
    if not 1.7e9 < time.time() < 4.1e9:
        return error(f"the clock says {time.ctime()}", "timedatectl set-ntp true")
    with scratch(settings) as here:
        before = time.time()
        (here / "touched").write_text("now")
        stamp, after = (here / "touched").stat().st_mtime, time.time()
    ahead = max(0.0, stamp - after, before - stamp)
    if ahead > SKEW:
        found = f"the clock of {existing(settings.run_folder)} differs by {ahead:.1f} s from this machine's"
        return warning(found, "timedatectl set-ntp true   # on both")
    return ok(f"{time.strftime('%Y-%m-%d %H:%M:%S %Z')}, and the file system agrees")


CHECKS = [
    Check("clock", "disk", clock),
    Check("space", "disk", space),
    Check("writing", "disk", writing, slow=True, limit=60),
    Check("renames", "disk", renames),
    Check("locks", "disk", locks),
]
