"""A log of the samples that every step consumed, rank by rank: proof that none was lost or taken twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

from adaptive.data.reading.stream import Batch
from adaptive.errors import MachineError
from adaptive.files import write_atomically
from adaptive.training.trainer import Callback, Trainer

FOLDER = "samples"


class SampleLog(Callback):
    """Appends a line per micro batch to ``samples/rank-0000.jsonl``: step (from 1), micro batch, and sample ids."""

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder / FOLDER, rank, world
        self.micro = 0

    def on_start(self, trainer: Trainer) -> None:
        """Drop what an interrupted run consumed beyond the step it is continued from."""
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.glob("rank-*.jsonl"):
            number = int(path.stem.removeprefix("rank-"))
            if number == self.rank or (self.rank == 0 and number >= self.world):
                kept = [line for line in _lines(path) if _step_of(line) <= trainer.progress.step]
                write_atomically(path, "".join(kept))

    def on_batch(self, trainer: Trainer, batch: Batch) -> None:
        """Write one line."""
        line = {"step": trainer.progress.step + 1, "micro": self.micro, "ids": batch.ids.tolist()}
        self.micro = (self.micro + 1) % trainer.batch.accumulation
        try:
            with (self.folder / f"rank-{self.rank:04d}.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise MachineError(
                f"cannot write {self.folder}: {error.strerror}; free space, or set tracking.sample_ids=false"
            ) from None


def consumed(run_folder: Path) -> dict[int, list[int]]:
    """Return the ids of every step's global batch, in its order: micro batches first, ranks within."""
    entries = []
    for path in sorted((run_folder / FOLDER).glob("rank-*.jsonl")):
        for line in _lines(path):
            entry = json.loads(line)
            entries.append((entry["step"], entry["micro"], path.name, entry["ids"]))
    steps: dict[int, list[int]] = {}
    for step, _, _, ids in sorted(entries):
        steps.setdefault(step, []).extend(ids)
    return steps


def _step_of(line: str) -> float:
    """Return a line's step; infinity for one that nobody here wrote, which goes with those of steps to come."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def _lines(path: Path) -> list[str]:
    """Return the whole lines; a kill leaves at most a torn last one."""
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
