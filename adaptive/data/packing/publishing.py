"""Where a packed dataset comes to lie: beside its destination until it is whole, and there by one rename."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path

from adaptive.data.shards.index import INDEX_NAME, load_index
from adaptive.errors import DataError, MachineError
from adaptive.files import sync_folder
from adaptive.foreign_text import shell_words
from adaptive.locks import Lock, LockHeldError, contents, workshop

LISTED = 5  # names that a message lists
REPLACED, DISCARDED = "replaced", "discarded"  # the dataset before, beside the new one


def check_place(source: str | Path, final: Path) -> None:
    """Refuse a destination inside the source, or that cannot be renamed (raises DataError)."""
    if not str(source).startswith("builtin:") and final.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"destination {final} lies inside the source {source}; give another folder")
    if final.is_symlink() or final.is_mount():
        raise DataError(f"destination {final} is a link or a mount point; give a folder inside it")


def check_destination(final: Path, overwrite: bool) -> None:
    """Refuse a destination that holds what must not be replaced (raises DataError)."""
    if not final.exists():
        return
    if not final.is_dir():
        raise DataError(f"destination {final} is a file; give a folder")
    names = {path.name for path in final.iterdir()}
    if not names:
        return
    if INDEX_NAME not in names:
        raise DataError(f"destination {final} is not empty and holds no dataset; give another folder")
    if not overwrite:
        raise DataError(
            f"destination {final} already holds a dataset; replace it with --overwrite or give another folder"
        )
    own = {INDEX_NAME} | {shard.name for split in load_index(final).splits.values() for shard in split.shards}
    if foreign := sorted(names - own):
        raise DataError(
            f"destination {final} also holds {', '.join(foreign[:LISTED])}; move that away before --overwrite"
        )


@contextmanager
def staging_folder(staging: Path) -> Iterator[Lock]:
    """Create the folder beside the destination and lock it against a second packing (DataError, MachineError)."""
    with ExitStack() as held:
        try:
            with machine_errors(staging):
                lock = held.enter_context(workshop(staging))
        except LockHeldError as error:
            where = f" ({error.holder})" if error.holder else ""
            remedy = f"; if it has gone, rm {shell_words(error.file)}" if error.silent else "; wait for it to end"
            raise DataError(f"{staging} is in use by another adaptive pack{where}{remedy}") from None
        yield lock


def tidy(staging: Path, final: Path) -> None:
    """Clear away what a killed packing left half done: the dataset that it replaced, or was about to."""
    replaced, discarded = staging / REPLACED, staging / DISCARDED
    if replaced.exists() and (final / INDEX_NAME).exists():
        shutil.rmtree(discarded, ignore_errors=True)
        replaced.rename(discarded)
    elif replaced.exists():
        replaced.rename(final)
    if discarded.exists():
        shutil.rmtree(discarded)


@contextmanager
def machine_errors(staging: Path) -> Iterator[None]:
    """Turn errors of writing into MachineErrors that name the remedy."""
    try:
        yield
    except BrokenProcessPool:
        raise MachineError(
            "a packing process was killed, usually for lack of memory; run again with fewer --workers, "
            "finished shards are kept"
        ) from None
    except OSError as error:
        path = error.filename or staging
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"no space left for {path}; free some and run again, finished shards are kept") from None
        raise MachineError(f"cannot write {path}: {error.strerror}; check the path and its permissions") from None


def publish(lock: Lock, staging: Path, final: Path, overwrite: bool) -> None:
    """Put the finished dataset in place by one rename; a dataset that is replaced is moved away first."""
    if lock.lost:
        raise MachineError(f"{lock.lost}: this packing stood still for too long; run it again")
    check_destination(final, overwrite)
    replaced, discarded = staging / REPLACED, staging / DISCARDED
    if final.exists() and any(final.iterdir()):
        final.rename(replaced)
    try:
        (staging / "dataset").rename(final)
    except BaseException:
        tidy(staging, final)
        raise
    sync_folder(final.parent)
    if replaced.exists():
        # Never half removed under a name from which it would come back.
        replaced.rename(discarded)
    for path in contents(staging):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
