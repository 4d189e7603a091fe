"""Saving in the background: a thread writes checkpoints while training goes on, and the loop hears of failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist
from torch import Tensor

from adaptive.config.sections import CheckpointConfig
from adaptive.errors import MachineError
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore


class Saver:
    """Writes snapshots in a thread, one after another, on rank 0; on the other ranks it has nothing to do.

    Args:
        store: where to.
        config: how much stays, whether to write in the background, how many failures in a row are too many.
        warn: takes a line about a failure and the number of failed saves in a row, in the thread of the loop.
    """

    def __init__(self, store: CheckpointStore, config: CheckpointConfig, warn: Callable[[str, int], None]) -> None:
        self.store, self.config, self.warn = store, config, warn
        self.failed = 0  # saves in a row
        self.saved: Checkpoint | None = None  # the last that is whole on disk
        self._trouble = ""  # of the last that failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: Future[str | None] | None = None

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        score: float | None,
        phase: int,
        epoch: int,
    ) -> None:
        """Write a snapshot as ``CheckpointStore.save`` does, and remove what need not stay.

        ``tensors`` are the writer's from now on: nobody may change them. It returns at once unless
        ``checkpoint.asynchronous`` is off; a save under way is waited for.

        Raises:
            MachineError: too many saves in a row have failed.
        """
        self.wait()
        self._under_way = self._thread.submit(self._write, step, tensors, state, score, phase, epoch)
        if not self.config.asynchronous:
            self.wait()

    @property
    def busy(self) -> bool:
        """Whether a save is still under way."""
        return self._under_way is not None and not self._under_way.done()

    def poll(self) -> None:
        """Take note of a save that has ended meanwhile (raises as ``wait`` does)."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way, if any, is on disk.

        Raises:
            MachineError: it failed, and with it ``checkpoint.max_failed`` in a row.
        """
        if self._under_way is None:
            return
        trouble = self._under_way.exception()
        ended, self._under_way = self._under_way, None
        if trouble is None:
            self.failed = 0
            note = ended.result()
            if note is not None:
                self.warn(note, 0)
            return
        if not isinstance(trouble, MachineError):
            raise trouble
        self.failed, self._trouble = self.failed + 1, str(trouble)
        most = self.config.max_failed
        self.warn(f"{trouble} (failed saves in a row: {self.failed}, checkpoint.max_failed = {most})", self.failed)
        if self.failed >= most:
            raise MachineError(f"{trouble}; checkpoint.max_failed = {most} is reached. {self._remedy()}")

    def finish(self) -> None:
        """Wait for the last save of the run, and let all ranks know how it ended (collective).

        Raises:
            MachineError: it failed; on every rank.
        """
        outcome: list[MachineError | None] = [None]
        try:
            self.wait()
            if self.failed:
                why = f"the last checkpoint of the run could not be saved: {self._trouble}"
                outcome = [MachineError(f"{why}. {self._remedy()}")]
        except MachineError as error:
            outcome = [error]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(outcome)
        if outcome[0] is not None:
            raise outcome[0]

    def close(self) -> None:
        """Let a save under way end, whatever becomes of it; for a run that ends, by itself or by an error."""
        try:
            self.wait()
        except MachineError:
            pass  # the warning has been given
        except Exception as error:
            self.warn(f"a checkpoint was not written: {error!r}", self.failed)
        self._thread.shutdown()

    def _write(self, step: int, *snapshot: Any) -> str | None:
        """In the thread: returns what is worth a line although the checkpoint was saved."""
        self.saved = self.store.save(step, *snapshot)
        try:
            self.store.prune(self.config.keep, self.config.keep_every, newest=step)
        except OSError as error:
            return f"old checkpoints in {self.store.folder} cannot be removed: {error.strerror}; they take up space"
        return None

    def _remedy(self) -> str:
        newest, _ = self.store.newest_valid()
        good = f"The newest good checkpoint is {newest.path}" if newest else "There is no good checkpoint"
        return f"{good}; make room or mend the disk, and the same command continues from there"
