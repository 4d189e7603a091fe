"""A list of a run's checkpoints with sizes, times and faults, as ``adaptive checkpoint`` prints it."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore, best_of, lasting_of, newest_of, verify


@dataclass(frozen=True)
class InventoryEntry:
    """One checkpoint of the list.

    Attributes:
        checkpoint: the folder and what its manifest says.
        bytes: size of all its files.
        saved: seconds since 1970.
        fault: what is wrong with it, or None.
        newest: whether a run goes on from it.
        best: whether it has the highest score of the latest phase.
        lasting: whether it is kept for ever.
    """

    checkpoint: Checkpoint
    bytes: int
    saved: float
    fault: str | None
    newest: bool
    best: bool
    lasting: bool


def take_inventory(store: CheckpointStore, keep_every: int = 0, quick: bool = False) -> list[InventoryEntry]:
    """Look at every checkpoint, oldest first; what a run removes meanwhile is left out.

    Args:
        store: the folder.
        keep_every: checkpoint.keep_every of the run.
        quick: compare sizes only, and read no file for its checksum.
    """
    faults: dict[Checkpoint, str | None] = {}
    measured: dict[Checkpoint, tuple[int, float]] = {}
    for checkpoint in store.all():
        faults[checkpoint] = verify(checkpoint.path, quick)
        measured[checkpoint] = 0, 0.0
        try:
            files = [path.stat() for path in checkpoint.path.iterdir()]
            measured[checkpoint] = sum(file.st_size for file in files), checkpoint.path.stat().st_mtime
        except FileNotFoundError:
            del faults[checkpoint]
        except OSError:
            pass  # which its fault says
    found = list(faults)

    def is_sound(checkpoint: Checkpoint) -> bool:
        return faults[checkpoint] is None

    newest = newest_of(found, 1, is_sound)
    best = best_of(found, is_sound)
    lasting = lasting_of(found, keep_every)
    return [
        InventoryEntry(c, *measured[c], fault=faults[c], newest=c in newest, best=c == best, lasting=c in lasting)
        for c in found
    ]
