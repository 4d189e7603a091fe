"""Batches from shards, in the planned order, on any number of ranks and workers (the one webdataset import).

The order comes from `adaptive.data.reading.order`; worker w of n makes every n-th batch, and the loader takes the
workers in turn, so what comes out does not depend on n. Nothing is read twice or skipped over: samples are read by
offset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import torch
import webdataset
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info
from webdataset.tariterators import base_plus_ext

from adaptive.config.sections import DataConfig
from adaptive.data.faults import Fault, Ledger
from adaptive.data.images.decode import decode_image
from adaptive.data.images.decode_window import Normalize, stack_pixels
from adaptive.data.images.transforms import eval_transform, train_transform
from adaptive.data.reading.order import accumulation_steps, evaluation_batches, steps_per_epoch
from adaptive.data.reading.samples import PADDING as PADDING  # padded and left-out places of a batch
from adaptive.data.reading.samples import SampleReader, Stored
from adaptive.data.reading.schedule import EvaluationSchedule, Schedule, TrainSchedule
from adaptive.data.reading.workers import HungWorkerError, without_room, work
from adaptive.data.remote.urls import is_remote
from adaptive.data.seeding import AUGMENT, Seeds, preserved
from adaptive.data.shards.cache import ShardCache, check_cache, shard_files
from adaptive.data.shards.index import DatasetIndex, SplitInfo, check_shards
from adaptive.data.shards.prefetch import Ahead
from adaptive.data.shards.reader import Files, ShardReader
from adaptive.errors import AdaptiveError, DataError, MachineError

CPU = torch.device("cpu")
REPLACED = 3  # hung workers one after the other; more of them have a reason that others will meet as well
_LOG = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (N, 3, H, W) float32, normalised, on the stream's device; labels and sample ids, (N,) int64, on the CPU.

    Padded places are 0, -1 and -1.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class TrainStream:
    """Endless augmented training data, addressed by optimizer steps counted from 0 over all epochs.

    A bad sample's place is taken by the next readable one (data.max_bad); ``bad`` is the ledger of what this rank met.
    Images are normalised on ``device``, into the memory format ``layout``.

    Raises:
        DataError: the split or a shard is missing, or it holds fewer images than one global batch.
        ConfigError: global_batch is not divisible by micro_batch * world, an augmentation is unknown, or the cache of
            a URL cannot hold data.shuffle_window shards.
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
        device: torch.device = CPU,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._shards = _Shards.of(index, folder, split, data_config, data_config.shuffle_window)
        info = index.split(split)
        self.bad = Ledger(data_config.max_bad)
        self.steps_per_epoch = steps_per_epoch(info.count, global_batch)
        self.accumulation = accumulation_steps(global_batch, micro_batch, world)
        self._schedule = TrainSchedule(
            info.counts, seed, data_config.shuffle_window, global_batch, micro_batch, rank, world, self.accumulation
        )
        self._transform = _Transform.for_training(data_config, seed)
        normalize = Normalize(data_config.mean, data_config.std, device, layout)
        self._loading = _Loading(micro_batch, workers, device, normalize)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield this rank's micro batches of the steps [first_step, last_step), ``accumulation`` for each.

        Epochs (step // steps_per_epoch) follow one another in the same workers; closing the iterator ends them.

        Raises:
            DataError: a sample cannot be read; names its shard and key. With data.max_bad: more than so many.
            MachineError: a worker process died, or the cache cannot be written.
        """
        first, last = first_step * self.accumulation, last_step * self.accumulation
        source = _Source(self._schedule, first, last, self._shards, self._transform)
        yield from _load(source, self._loading, self.bad)


class EvaluationStream:
    """One deterministic pass per iteration: every image once over all ranks, equally many batches on each.

    Bad samples are left out (data.max_bad): their places have label and id -1. ``bad`` is the ledger of what this rank
    met in all passes, ``left_out`` counts those of the latest pass, by kind.

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
        device: torch.device = CPU,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self._shards = _Shards.of(index, folder, split, data_config, 2)
        info = index.split(split)
        self.total = info.count
        self.bad = Ledger(data_config.max_bad)
        self._pass = Ledger(data_config.max_bad)
        self._schedule = EvaluationSchedule(info.counts, evaluation_batches(info.count, batch, rank, world))
        self._transform = _Transform.for_evaluation(data_config)
        normalize = Normalize(data_config.mean, data_config.std, device, layout)
        self._loading = _Loading(batch, min(workers, len(self)), device, normalize)

    @property
    def left_out(self) -> dict[str, int]:
        """Samples that the latest pass left out on this rank, by kind."""
        return self._pass.by_kind

    def __len__(self) -> int:
        return len(self._schedule.ids)

    def __iter__(self) -> Iterator[Batch]:
        self._pass = Ledger(self.bad.limit)
        source = _Source(self._schedule, 0, len(self), self._shards, self._transform)
        yield from _load(source, self._loading, self.bad, self._pass)


@dataclass(frozen=True)
class _Shards:
    """A split's shards and how they are read."""

    files: Files
    info: SplitInfo
    num_classes: int
    capacity: int
    ahead: int
    max_bad: int

    @classmethod
    def of(cls, index: DatasetIndex, folder: str | Path, split: str, settings: DataConfig, window: int) -> _Shards:
        info, ahead = index.split(split), 0
        if is_remote(folder):  # sizes were asked for once, before the ranks met
            held = check_cache(index, split, settings)
            wanted = settings.shuffle_window if settings.cache_ahead is None else settings.cache_ahead
            ahead = max(0, min(wanted, held - window))
        else:
            check_shards(index, folder, split, settings=settings, quiet=True)
        files = shard_files(folder, index, settings)
        return cls(files, info, len(index.classes), max(2, window), ahead, settings.max_bad)


@dataclass(frozen=True)
class _Transform:
    """Turns an image file's bytes into a tensor; ``seed`` is None where the transform is deterministic."""

    transform: Callable[[bytes], Tensor]
    image_size: int
    seed: int | None

    @classmethod
    def for_training(cls, data: DataConfig, seed: int) -> _Transform:
        return cls(train_transform(data, normalize=False), data.image_size, seed)

    @classmethod
    def for_evaluation(cls, data: DataConfig) -> _Transform:
        transform = eval_transform(data, normalize=False)
        return cls(lambda image: transform(decode_image(image)), data.image_size, None)


class _Item(NamedTuple):
    stored: Stored
    epoch: int
    seeds: Seeds | None  # of the sample asked for


@dataclass
class _Source:
    """The stages of a worker's pipeline: stored samples of its batches, tensors, batches with the faults met."""

    schedule: Schedule
    first: int
    last: int
    shards: _Shards
    transform: _Transform
    reader: SampleReader | None = None

    def read(self) -> Iterator[_Item]:
        """Yield the stored samples of this worker's batches, batch by batch."""
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        shards = self.shards
        files = ShardReader(shards.files, shards.info.shards, base_plus_ext, shards.capacity)
        replace_bad = self.transform.seed is not None
        self.reader = SampleReader(files, shards.info, shards.num_classes, replace_bad, shards.max_bad)
        ahead = self._fetch_ahead()
        try:
            for number in range(self.first + offset, self.last, step):
                if ahead:
                    ahead.advance(*self.schedule.needs(number))
                epoch, ids = self.schedule.batch(number)
                stored = self.reader.read(ids)
                yield from map(_Item, stored, repeat(epoch), [self._seeds(epoch, sample.id) for sample in stored])
        finally:
            if ahead:
                ahead.close()
            files.close()

    def decode(self, item: _Item) -> tuple[Tensor, int, int]:
        """Return a sample's tensor (3, H, W), label and id."""
        assert self.reader is not None

        def make(data: bytes, identity: int) -> Tensor:
            seeds = item.seeds if identity == item.stored.id else self._seeds(item.epoch, identity)
            if seeds is not None:
                seeds.use()
            return self.transform.transform(data)

        image, label, identity = self.reader.decode(item.stored, make)
        if image is None:
            size = self.transform.image_size
            image = torch.zeros(3, size, size, dtype=torch.uint8)
        return image, label, identity

    def deliver(self, batches: Iterator[_Made]) -> Iterator[tuple[_Made, list[Fault]] | _Failure]:
        """Yield batches with the faults met for them; errors as values: the loader would wrap them in tracebacks.

        A batch is made here, with the generators that augmentation draws from put aside.
        """
        try:
            while True:
                with preserved():
                    batch = next(batches, None)
                if batch is None:
                    return
                assert self.reader is not None
                yield batch, self.reader.take_news()
        except RuntimeError as error:
            yield _Failure(MachineError, str(without_room(error)))
        except AdaptiveError as error:
            yield _Failure(MachineError if isinstance(error, MachineError) else DataError, str(error))

    def _seeds(self, epoch: int, identity: int) -> Seeds | None:
        if self.transform.seed is None or identity == PADDING:
            return None
        return Seeds(AUGMENT, self.transform.seed, epoch, identity)

    def _fetch_ahead(self) -> Ahead | None:
        files = self.shards.files
        if not isinstance(files, ShardCache) or self.first >= self.last:
            return None
        _, end = self.schedule.needs(self.last - 1)
        return Ahead(files, lambda place: self.shards.info.shards[self.schedule.shard(place)], end, self.shards.ahead)


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a worker: the loader would wrap an exception in its traceback."""

    kind: type[AdaptiveError]
    message: str


@dataclass(frozen=True)
class _Loading:
    """Samples per batch, worker processes, and the device on which batches are normalised.

    Workers hand over pixels: a quarter of the bytes to copy to this process and on to the device.
    """

    batch: int
    workers: int
    device: torch.device
    normalize: Normalize

    @property
    def processes(self) -> tuple[int, bool]:
        """How many workers, and whether what they make is pinned."""
        return self.workers, self.device.type == "cuda"

    def finish(self, made: _Made) -> Batch:
        """Return the batch with its images on the device, normalised; padded and left-out places stay 0."""
        images = made.images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = self.normalize(images)
            for place, label in enumerate(made.labels):
                if label == PADDING:  # few or none
                    images[place] = 0
        else:  # normalised by the transform
            images = images.contiguous(memory_format=self.normalize.layout)
        # Pinned like the images, or the step that copies them to a GPU might wait for it.
        labels = torch.tensor(made.labels, pin_memory=self.device.type == "cuda")
        return Batch(images, labels, torch.tensor(made.ids))


class _Made(NamedTuple):
    """A batch as a worker hands it over: images in shared memory, made there, and plain numbers.

    A tensor that is still to be copied there when it is handed over is lost without a word where there is no room.
    """

    images: Tensor
    labels: Sequence[int]
    ids: Sequence[int]


def _collate(samples: list[tuple[Tensor, int, int]]) -> _Made:
    images, labels, ids = zip(*samples, strict=True)
    return _Made(stack_pixels(images) if images[0].dtype == torch.uint8 else default_collate(list(images)), labels, ids)


def _load(source: _Source, loading: _Loading, *ledgers: Ledger) -> Iterator[Batch]:
    hung = 0  # workers, since the last batch
    while True:
        try:
            with closing(work(_pipeline(source, loading), *loading.processes)) as items:
                for item in items:
                    if isinstance(item, _Failure):
                        raise item.kind(item.message)
                    batch, faults = item
                    for number, ledger in enumerate(ledgers):
                        ledger.add(faults, tell=number == 0)
                        ledger.check()
                    source, hung = replace(source, first=source.first + 1), 0
                    yield loading.finish(batch)
                return
        except HungWorkerError as error:
            hung += 1
            if hung > REPLACED:
                raise MachineError(f"{error}, like {REPLACED} before it; data.workers=0 does without them") from None
            _LOG.warning("%s: the workers are started again, and nothing is lost", error)


def _pipeline(source: _Source, loading: _Loading) -> webdataset.DataPipeline:
    return webdataset.DataPipeline(
        source.read,
        webdataset.map(source.decode),
        webdataset.batched(loading.batch, collation_fn=_collate),
        source.deliver,
    )
