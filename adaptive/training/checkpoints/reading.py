"""Reads a checkpoint of a run that may still be trained: one that is removed or replaced meanwhile is chosen anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from adaptive.errors import AdaptiveError, CheckpointError
from adaptive.training.checkpoints.checkpoint_manifest import MANIFEST
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore

MOST_ATTEMPTS = 100
Read = TypeVar("Read")


def read_chosen(store: CheckpointStore, choose: Callable[[], Checkpoint], read: Callable[[Checkpoint], Read]) -> Read:
    """Choose a checkpoint and return what is read of it, all of one save.

    Args:
        store: whose checkpoints they are.
        choose: one of them; called again when the one before has gone.
        read: its files; also called again, and should keep what takes long and does not depend on them.

    Raises:
        CheckpointError: checkpoints are removed faster than they can be read, or whatever ``choose`` and ``read`` raise
            of one that stays.
    """
    for _ in range(MOST_ATTEMPTS):
        listed = _stamps(store)
        try:
            checkpoint = choose()
        except (AdaptiveError, OSError):
            if _stamps(store) == listed:
                raise
            continue
        stamp = _stamp(checkpoint)
        try:
            found = read(checkpoint)
        except (AdaptiveError, OSError):
            if stamp is not None and _stamp(checkpoint) == stamp:
                raise
            continue
        if stamp is not None and _stamp(checkpoint) == stamp:
            return found
    raise CheckpointError(
        f"{store.folder}: checkpoints are removed faster than they can be read; raise checkpoint.keep of the run that "
        "is trained there, or wait for its end"
    )


def _stamp(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Return what tells a save from another of the same step; None where it has gone."""
    try:
        found = (checkpoint.path / MANIFEST).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _stamps(store: CheckpointStore) -> dict[str, tuple[int, int] | None]:
    return {checkpoint.path.name: _stamp(checkpoint) for checkpoint in store.all()}
