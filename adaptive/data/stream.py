"""Batches from shards, in the planned order, on any number of ranks and workers (the one webdataset import).

The order comes from `adaptive.data.plan`; worker w of n makes every n-th batch, and the loader takes the workers in
turn, so what comes out does not depend on n. Nothing is read twice or skipped over: samples are read by offset.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import getpid, getppid, kill
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from webdataset.tariterators import base_plus_ext

from adaptive.config import DataConfig
from adaptive.data import plan
from adaptive.data.decode import ImageError, decode_image
from adaptive.data.index import DatasetIndex, SplitInfo, check_shards
from adaptive.data.seeding import AUGMENT, seeded
from adaptive.data.shards import ShardReader
from adaptive.data.transforms import Transform, eval_transform, train_transform
from adaptive.errors import DataError, MachineError

PADDING = -1


class Batch(NamedTuple):
    """Images (N, 3, H, W) float32, labels (N,) int64, sample ids (N,) int64; padded places are 0, -1 and -1."""

    images: Tensor
    labels: Tensor
    ids: Tensor


class TrainStream:
    """Endless augmented training data, addressed by optimizer steps counted from 0 over all epochs.

    Raises:
        DataError: the split or a shard is missing, or it holds fewer images than one global batch.
        ConfigError: global_batch is not divisible by micro_batch * world, or an augmentation is unknown.
    """

    def __init__(
        self,
        index: DatasetIndex,
        folder: str | Path,
        split: str,
        data_config: DataConfig,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        check_shards(index, folder, split)
        info = index.split(split)
        self.steps_per_epoch = plan.steps_per_epoch(info.count, global_batch)
        self.accumulation = plan.accumulation_steps(global_batch, micro_batch, world)
        self._plan = _TrainPlan(
            info.counts, seed, data_config.shuffle_window, global_batch, micro_batch, rank, world, self.accumulation
        )
        self._samples = _Samples(
            Path(folder),
            info,
            len(index.classes),
            train_transform(data_config),
            data_config.image_size,
            seed,
            data_config.shuffle_window,
        )
        self._micro_batch = micro_batch
        self._workers = workers
        self._pin_memory = pin_memory

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield this rank's micro batches of the steps [first_step, last_step), ``accumulation`` for each.

        Epochs (step // steps_per_epoch) follow one another in the same workers; closing the iterator ends them.

        Raises:
            DataError: a sample cannot be read; names its shard and key.
            MachineError: a worker process died.
        """
        source = _Source(self._plan, first_step * self.accumulation, last_step * self.accumulation, self._samples)
        yield from _load(source, self._micro_batch, self._workers, self._pin_memory)


class EvaluationStream:
    """One deterministic pass per iteration: every image once over all ranks, equally many batches on each.

    Raises:
        DataError: the split or a shard is missing.
    """

    def __init__(
        self,
        index: DatasetIndex,
        folder: str | Path,
        split: str,
        data_config: DataConfig,
        *,
        batch: int,
        rank: int,
        world: int,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        check_shards(index, folder, split)
        info = index.split(split)
        self.total = info.count
        self._plan = _EvaluationPlan(plan.evaluation_batches(info.count, batch, rank, world))
        self._samples = _Samples(
            Path(folder), info, len(index.classes), eval_transform(data_config), data_config.image_size, None, 2
        )
        self._batch = batch
        self._workers = workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self._plan.ids)

    def __iter__(self) -> Iterator[Batch]:
        source = _Source(self._plan, 0, len(self), self._samples)
        yield from _load(source, self._batch, min(self._workers, len(self)), self._pin_memory)


@dataclass
class _TrainPlan:
    """Batch number over all epochs -> (epoch, sample ids)."""

    counts: list[int]
    seed: int
    shuffle_window: int
    global_batch: int
    micro_batch: int
    rank: int
    world: int
    accumulation: int
    _epoch: int = -1
    _batches: NDArray[np.int64] | None = None

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        epoch, place = divmod(number, sum(self.counts) // self.global_batch * self.accumulation)
        if self._batches is None or epoch != self._epoch:
            order = plan.epoch_order(self.counts, self.seed, epoch, self.shuffle_window)
            self._batches = plan.rank_batches(order, self.global_batch, self.micro_batch, self.rank, self.world)
            self._epoch = epoch
        return epoch, self._batches[place]


@dataclass
class _EvaluationPlan:
    ids: NDArray[np.int64]

    def __call__(self, number: int) -> tuple[int, NDArray[np.int64]]:
        return 0, self.ids[number]


@dataclass
class _Samples:
    """Turns stored samples into tensors; ``seed`` is None where the transform is deterministic."""

    folder: Path
    info: SplitInfo
    num_classes: int
    transform: Transform
    image_size: int
    seed: int | None
    open_shards: int

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, int, int]:
        raw, identity = sample["raw"], sample["id"]
        if raw is None:
            return torch.zeros(3, self.image_size, self.image_size), PADDING, PADDING
        where = f"shard {raw.shard}, sample {raw.key}"
        if not 0 <= raw.label < self.num_classes:
            raise DataError(f"{where}: label {raw.label} is not in 0..{self.num_classes - 1}; pack again")
        try:
            image = decode_image(raw.image)
        except ImageError as error:
            raise DataError(f"{where}: {error}; copy the shard again or pack again") from None
        if self.seed is None:
            return self.transform(image), raw.label, identity
        with seeded(AUGMENT, self.seed, sample["epoch"], identity):
            return self.transform(image), raw.label, identity


@dataclass
class _Source:
    """First stage of the pipeline: the stored samples of this worker's batches, in order."""

    plan: Callable[[int], tuple[int, NDArray[np.int64]]]
    first: int
    last: int
    samples: _Samples

    def __call__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        info = self.samples.info
        reader = ShardReader(self.samples.folder, info.shards, base_plus_ext, max(2, self.samples.open_shards))
        try:
            for number in range(self.first + offset, self.last, step):
                epoch, ids = self.plan(number)
                shards, positions = plan.locate(np.maximum(ids, 0), info.counts)
                for identity, shard, position in zip(ids.tolist(), shards.tolist(), positions.tolist(), strict=True):
                    raw = None if identity == PADDING else reader.read(shard, position)
                    key = raw.key if raw else ""
                    yield {"__key__": key, "raw": raw, "id": identity, "epoch": epoch}
        finally:
            reader.close()


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a worker: the loader would wrap an exception in its traceback."""

    message: str


def _report_failure(batches: Iterator[Batch]) -> Iterator[Batch | _Failure]:
    try:
        yield from batches
    except DataError as error:
        yield _Failure(str(error))


def _collate(samples: list[tuple[Tensor, int, int]]) -> Batch:
    images, labels, ids = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(ids))


def _load(source: _Source, batch: int, workers: int, pin_memory: bool) -> Iterator[Batch]:
    pipeline = webdataset.DataPipeline(
        source, webdataset.map(source.samples), webdataset.batched(batch, collation_fn=_collate), _report_failure
    )
    loader = DataLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_settle_worker,
        # The loader draws a seed that nothing here uses; from torch's own generator, a resumed run would see the gap.
        generator=torch.Generator(),
    )
    iterator = iter(loader)
    try:
        while (item := _next(iterator)) is not None:
            if isinstance(item, _Failure):
                raise DataError(item.message)
            yield item
    finally:
        # The loader ends its workers when its iterator is dropped; do not wait for the garbage collector.
        del iterator


def _next(iterator: Iterator[Batch | _Failure]) -> Batch | _Failure | None:
    try:
        return next(iterator, None)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise MachineError(
            f"a data worker died ({str(error).splitlines()[0]}): usually out of memory or of /dev/shm; "
            "lower data.workers or train.micro_batch"
        ) from None


def _settle_worker(_: int) -> None:
    """Leave signals to the training process: Slurm sends them to every process of a job, workers included.

    The loader itself ends workers with SIGTERM when they hang, so that one is obeyed if it comes from the parent.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = getppid()

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        kill(getpid(), signal.SIGKILL)

    threading.Thread(target=obey_parent, name="terminate", daemon=True).start()
