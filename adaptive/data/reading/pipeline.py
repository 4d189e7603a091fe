"""The pipeline that makes batches: a worker reads, decodes and collates samples, the rank's process normalises them.

This is the one module that imports webdataset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from typing import NamedTuple

import torch
import webdataset
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from adaptive.config.sections import DataConfig
from adaptive.data.faults import Fault, Ledger
from adaptive.data.images.decode import decode_image
from adaptive.data.images.encoded import BatchDecoder, EncodedTransform, is_encoded, pack_records
from adaptive.data.images.normalize import Normalize, stack_pixels
from adaptive.data.images.transforms import eval_transform, train_transform
from adaptive.data.reading.samples import PADDING, SampleReader, StoredSample
from adaptive.data.reading.schedule import Schedule
from adaptive.data.reading.workers import HungWorkerError, iterate, shared_memory_error
from adaptive.data.remote.urls import is_remote
from adaptive.data.seeding import AUGMENT, Seeds, preserved
from adaptive.data.shards.cache import ShardCache, check_cache, shard_files
from adaptive.data.shards.index import DatasetIndex, SplitInfo, check_shards
from adaptive.data.shards.prefetch import Prefetcher
from adaptive.data.shards.reader import ShardFiles, ShardReader
from adaptive.errors import AdaptiveError, DataError, MachineError

CPU = torch.device("cpu")
MAX_RESTARTS = 3  # after hung workers in a row; more of them have a cause that further ones would meet as well
_LOG = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (N, 3, H, W) float32, normalised, on the stream's device; labels and sample ids, (N,) int64, on the CPU.

    Padding is 0, -1 and -1.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class LoaderOptions:
    """Who loads batches, and where they go; by default a single process without workers, on the CPU.

    Attributes:
        rank: of this process.
        world: number of ranks.
        workers: loader processes of this rank; 0 loads in this one.
        device: on which images are normalised.
        layout: memory format of the images.
    """

    rank: int = 0
    world: int = 1
    workers: int = 0
    device: torch.device = CPU
    layout: torch.memory_format = torch.contiguous_format


@dataclass(frozen=True)
class SplitShards:
    """The shards of a split, how many of them are open or prefetched at a time, and how many bad samples may be met."""

    files: ShardFiles
    info: SplitInfo
    num_classes: int
    capacity: int
    prefetch: int
    max_bad: int

    @classmethod
    def of(cls, index: DatasetIndex, data: DataConfig, split: str, window: int) -> SplitShards:
        """Check a split's shards and return them, of which ``window`` are read at a time (raises DataError)."""
        info, prefetch = index.split(split), 0
        if is_remote(data.path):  # its sizes are checked once, before the ranks start
            cached = check_cache(index, split, data)
            wanted = data.shuffle_window if data.cache_ahead is None else data.cache_ahead
            prefetch = max(0, min(wanted, cached - window))
        else:
            check_shards(index, data.path, split, settings=data, quiet=True)
        files = shard_files(data.path, index, data)
        return cls(files, info, len(index.classes), max(2, window), prefetch, data.max_bad)


@dataclass(frozen=True)
class SampleTransform:
    """Turns an image file's bytes into a tensor; ``seed`` is None where the transform is deterministic."""

    transform: Callable[[bytes], Tensor]
    image_size: int
    seed: int | None

    @classmethod
    def for_training(cls, data: DataConfig, seed: int) -> SampleTransform:
        """Return the augmentation, seeded by ``seed``, epoch and sample."""
        if data.decoder == "cuda":
            return cls(EncodedTransform(data), data.image_size, seed)
        return cls(train_transform(data, normalize=False), data.image_size, seed)

    @classmethod
    def for_evaluation(cls, data: DataConfig) -> SampleTransform:
        """Return the transform of evaluation."""
        transform = eval_transform(data, normalize=False)
        return cls(lambda image: transform(decode_image(image)), data.image_size, None)


class _Undecoded(NamedTuple):
    """A sample as it was read, and what its augmentation depends on."""

    stored: StoredSample
    epoch: int
    seeds: Seeds | None  # of the sample that was asked for


@dataclass
class BatchSource:
    """The stages of a worker's pipeline: read samples, decode them to tensors, deliver batches with their faults."""

    schedule: Schedule
    first: int
    last: int
    shards: SplitShards
    transform: SampleTransform
    reader: SampleReader | None = None

    def read(self) -> Iterator[_Undecoded]:
        """Yield the stored samples of this worker's batches, batch by batch."""
        worker = get_worker_info()
        offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
        shards = self.shards
        files = ShardReader(shards.files, shards.info.shards, shards.capacity)
        replace_bad = self.transform.seed is not None
        self.reader = SampleReader(files, shards.info, shards.num_classes, replace_bad, shards.max_bad)
        prefetcher = self._start_prefetcher()
        try:
            for number in range(self.first + offset, self.last, step):
                if prefetcher:
                    prefetcher.advance(*self.schedule.needs(number))
                epoch, ids = self.schedule.batch(number)
                stored = self.reader.read(ids)
                yield from map(_Undecoded, stored, repeat(epoch), [self._seeds(epoch, sample.id) for sample in stored])
        finally:
            if prefetcher:
                prefetcher.close()
            files.close()

    def decode(self, item: _Undecoded) -> tuple[Tensor, int, int]:
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

    def deliver(self, batches: Iterator[_WorkerBatch]) -> Iterator[tuple[_WorkerBatch, list[Fault]] | _Failure]:
        """Yield batches, each with the faults met while it was made; errors as `_Failure`.

        Making a batch seeds the generators that augmentation draws from; they are restored after each.
        """
        try:
            while True:
                with preserved():
                    batch = next(batches, None)
                if batch is None:
                    return
                assert self.reader is not None
                yield batch, self.reader.take_new_faults()
        except RuntimeError as error:
            yield _Failure(MachineError, str(shared_memory_error(error)))
        except AdaptiveError as error:
            yield _Failure(MachineError if isinstance(error, MachineError) else DataError, str(error))

    def _seeds(self, epoch: int, identity: int) -> Seeds | None:
        if self.transform.seed is None or identity == PADDING:
            return None
        return Seeds(AUGMENT, self.transform.seed, epoch, identity)

    def _start_prefetcher(self) -> Prefetcher | None:
        files = self.shards.files
        if not isinstance(files, ShardCache) or self.first >= self.last:
            return None
        _, end = self.schedule.needs(self.last - 1)
        shards = self.shards
        return Prefetcher(files, lambda at: shards.info.shards[self.schedule.shard(at)], end, shards.prefetch)


@dataclass(frozen=True)
class _Failure:
    """A user's error as a value, on its way out of a worker: the loader would wrap an exception in its traceback."""

    kind: type[AdaptiveError]
    message: str


@dataclass(frozen=True)
class Loading:
    """Samples per batch, worker processes, and how a batch is finished in the rank's own process.

    Workers hand over uint8 pixels: a quarter of the bytes to copy to this process and on to the device.
    """

    batch: int
    workers: int
    device: torch.device
    normalize: Normalize
    decoder: BatchDecoder | None = None

    @classmethod
    def of(cls, data: DataConfig, batch: int, loader: LoaderOptions) -> Loading:
        """Return how ``loader`` loads batches of this many samples."""
        return cls(batch, loader.workers, loader.device, Normalize(data.mean, data.std, loader.device, loader.layout))

    @property
    def pinned(self) -> bool:
        """Whether batches are made in pinned memory, from which copies to a GPU need not be waited for."""
        return self.device.type == "cuda"

    def finish(self, made: _WorkerBatch) -> Batch:
        """Return the batch with its images on the device, normalised; padding stays 0."""
        encoded = self.decoder is not None and is_encoded([made.images])
        pixels = self.decoder(made.images, made.ids) if self.decoder and encoded else made.images
        images = pixels.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = self.normalize(images)
            for row, label in enumerate(made.labels):
                if label == PADDING:  # few or none
                    images[row] = 0
        else:  # normalised by the transform
            images = images.contiguous(memory_format=self.normalize.layout)
        labels = torch.tensor(made.labels, pin_memory=self.pinned)
        return Batch(images, labels, torch.tensor(made.ids))


class _WorkerBatch(NamedTuple):
    """A batch as a worker hands it over: images, created in shared memory, and plain numbers.

    A tensor elsewhere would be copied to shared memory on its way, and be lost silently where there is no room.
    """

    images: Tensor
    labels: Sequence[int]
    ids: Sequence[int]


def _collate(samples: list[tuple[Tensor, int, int]]) -> _WorkerBatch:
    images, labels, ids = zip(*samples, strict=True)
    if is_encoded(images):
        return _WorkerBatch(pack_records(images), labels, ids)
    pixels = stack_pixels(images) if images[0].dtype == torch.uint8 else default_collate(list(images))
    return _WorkerBatch(pixels, labels, ids)


def load_batches(source: BatchSource, loading: Loading, *ledgers: Ledger) -> Iterator[Batch]:
    """Yield the source's batches; a hung worker is replaced, and ``ledgers`` take the faults met.

    Raises:
        DataError: a sample cannot be read, or a ledger has more faults than its limit.
        MachineError: a worker died, several hung, or the cache cannot be written.
    """
    hung = 0  # workers in a row, without a batch in between
    while True:
        try:
            with closing(iterate(_pipeline(source, loading), loading.workers, loading.pinned)) as items:
                for item in items:
                    if isinstance(item, _Failure):
                        raise item.kind(item.message)
                    batch, faults = item
                    for number, ledger in enumerate(ledgers):
                        ledger.add(faults, warn=number == 0)
                        ledger.check()
                    source, hung = replace(source, first=source.first + 1), 0
                    yield loading.finish(batch)
                return
        except HungWorkerError as error:
            hung += 1
            if hung > MAX_RESTARTS:
                message = f"{error}, like {MAX_RESTARTS} before it; data.workers=0 does without them"
                raise MachineError(message) from None
            _LOG.warning("%s: the workers are started again, and nothing is lost", error)


def _pipeline(source: BatchSource, loading: Loading) -> webdataset.DataPipeline:
    return webdataset.DataPipeline(
        source.read,
        webdataset.map(source.decode),
        webdataset.batched(loading.batch, collation_fn=_collate),
        source.deliver,
    )
