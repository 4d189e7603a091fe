"""Batches from shards: a worker's pipeline reads, decodes and collates samples.

This is the one module that imports webdataset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import default_collate

from adaptive.config.sections import DataConfig
from adaptive.data.faults import Fault
from adaptive.data.images.crop_flip import CropFlipDraws, DrawnBy
from adaptive.data.images.decode import decode_image
from adaptive.data.images.encoded import EncodedTransform, is_encoded, pack_records
from adaptive.data.images.normalize import stack_pixels
from adaptive.data.images.transforms import drawn_transform, draws_per_sample, eval_transform, train_transform
from adaptive.data.reading.loading import Delivered, Loading, WorkerBatch, deliver, worker_numbers
from adaptive.data.reading.samples import PADDING, SampleReader, StoredSample
from adaptive.data.reading.schedule import Schedule
from adaptive.data.remote.urls import is_remote
from adaptive.data.seeding import AUGMENT, Seeds, preserved
from adaptive.data.shards.cache import ShardCache, check_cache, shard_files
from adaptive.data.shards.index import DatasetIndex, SplitInfo, check_shards
from adaptive.data.shards.prefetch import Prefetcher
from adaptive.data.shards.reader import ShardFiles, ShardReader, ShardTable


@dataclass(frozen=True)
class SplitShards:
    """The shards of a split, how many of them are open or prefetched at a time, and how many bad samples may be met.

    ``tables`` are the headers of shards that this process has scanned; what it forks inherits them.
    """

    files: ShardFiles
    info: SplitInfo
    num_classes: int
    capacity: int
    prefetch: int
    max_bad: int
    tables: dict[int, ShardTable] = field(default_factory=dict)

    @classmethod
    def of(cls, index: DatasetIndex, data: DataConfig, split: str, window: int, check: bool = True) -> SplitShards:
        """Return a split's shards, of which ``window`` are read at a time.

        With ``check`` a folder is looked through for them (DataError); one of several ranks does not: the first of its
        node has, before they met.
        """
        info, prefetch = index.split(split), 0
        if is_remote(data.path):  # its sizes are checked once, before the ranks start
            cached = check_cache(index, split, data)
            wanted = data.shuffle_window if data.cache_ahead is None else data.cache_ahead
            prefetch = max(0, min(wanted, cached - window))
        elif check:
            check_shards(index, data.path, split, settings=data, quiet=True)
        files = shard_files(data.path, index, data)
        return cls(files, info, len(index.classes), max(2, window), prefetch, data.max_bad)


@dataclass(frozen=True)
class SampleTransform:
    """Turns an image file's bytes into a tensor, as epoch and sample id say.

    Attributes:
        transform: of the bytes, and of the image's draws of crop and flip where there are ``draws``.
        image_size: in pixels.
        seed: of the generators that ``transform`` draws from; None where it does not.
        draws: of crop and flip.
    """

    transform: Callable[..., Tensor]
    image_size: int
    seed: int | None = None
    draws: CropFlipDraws | None = None

    @classmethod
    def for_training(cls, data: DataConfig, seed: int, count: int, drawn_by: DrawnBy = "epoch") -> SampleTransform:
        """Return the augmentation of a split of ``count`` samples, seeded by ``seed``, epoch and sample."""
        if data.decoder == "cuda":
            return cls(EncodedTransform(data), data.image_size, seed)
        if data.crop == "resize" or drawn_by == "sample":
            return cls(train_transform(data, normalize=False), data.image_size, seed)
        further = seed if draws_per_sample(data) else None
        return cls(drawn_transform(data), data.image_size, further, CropFlipDraws(seed, count))

    @classmethod
    def for_evaluation(cls, data: DataConfig) -> SampleTransform:
        """Return the transform of evaluation."""
        transform = eval_transform(data, normalize=False)
        return cls(lambda image: transform(decode_image(image)), data.image_size)

    def __call__(self, image: bytes, epoch: int, identity: int) -> Tensor:
        """Return the tensor (3, image_size, image_size) of an image file (raises ImageError)."""
        if self.draws is None:
            return self.transform(image)
        return self.transform(image, self.draws.of(epoch, [identity])[0])

    def seeds(self, epoch: int, identity: int) -> Seeds | None:
        """Return the seeds to use before a sample is transformed, None where nothing draws from the generators."""
        return None if self.seed is None or identity == PADDING else Seeds(AUGMENT, self.seed, epoch, identity)


class _Undecoded(NamedTuple):
    """A sample as it was read, and what its augmentation depends on."""

    stored: StoredSample
    epoch: int
    seeds: Seeds | None  # of the sample that was asked for


@dataclass
class BatchSource:
    """The stages of a worker's pipeline: read samples, decode them to tensors, deliver batches with their faults.

    ``replace_bad``: whether a bad sample is replaced by the next readable one (training) or left out (evaluation).
    """

    schedule: Schedule
    first: int
    last: int
    shards: SplitShards
    transform: SampleTransform
    replace_bad: bool
    reader: SampleReader | None = None

    def pipeline(self, loading: Loading) -> webdataset.DataPipeline:
        """Return the stages, one after another."""
        return webdataset.DataPipeline(
            self.read,
            webdataset.map(self.decode),
            webdataset.batched(loading.batch, collation_fn=_collate),
            self.deliver,
        )

    def rest(self) -> BatchSource:
        """Return the source without its first batch."""
        return replace(self, first=self.first + 1)

    def scan_headers(self) -> None:
        """Scan the headers of the shards that the batches need, once for all worker processes and further passes."""
        shards = self.shards
        reader = ShardReader(shards.files, shards.info.shards, 1, shards.tables)
        needed = (self.schedule.needs(number) for number in range(self.first, self.last))
        reader.scan_those_here(sorted({self.schedule.shard(at) for start, end in needed for at in range(start, end)}))

    def read(self) -> Iterator[_Undecoded]:
        """Yield the stored samples of this worker's batches, batch by batch."""
        shards = self.shards
        files = ShardReader(shards.files, shards.info.shards, shards.capacity, shards.tables)
        self.reader = SampleReader(files, shards.info, shards.num_classes, self.replace_bad, shards.max_bad)
        prefetcher = self._start_prefetcher()
        try:
            for number in worker_numbers(self.first, self.last):
                if prefetcher:
                    prefetcher.advance(*self.schedule.needs(number))
                epoch, ids = self.schedule.batch(number)
                stored = self.reader.read(ids)
                seeds = [self.transform.seeds(epoch, sample.id) for sample in stored]
                yield from map(_Undecoded, stored, repeat(epoch), seeds)
        finally:
            if prefetcher:
                prefetcher.close()
            files.close()

    def decode(self, item: _Undecoded) -> tuple[Tensor, int, int]:
        """Return a sample's tensor (3, H, W), label and id."""
        assert self.reader is not None

        def make(data: bytes, identity: int) -> Tensor:
            seeds = item.seeds if identity == item.stored.id else self.transform.seeds(item.epoch, identity)
            if seeds is not None:
                seeds.use()
            return self.transform(data, item.epoch, identity)

        image, label, identity = self.reader.decode(item.stored, make)
        if image is None:
            size = self.transform.image_size
            image = torch.zeros(3, size, size, dtype=torch.uint8)
        return image, label, identity

    def deliver(self, batches: Iterator[WorkerBatch]) -> Iterator[Delivered]:
        """Yield batches, each with the faults met while it was made; a user's error ends them as a value."""
        yield from deliver(self._with_faults(batches))

    def _with_faults(self, batches: Iterator[WorkerBatch]) -> Iterator[tuple[WorkerBatch, list[Fault]]]:
        while True:
            with preserved():  # making a batch seeds the generators that augmentation draws from
                batch = next(batches, None)
            if batch is None:
                return
            assert self.reader is not None
            yield batch, self.reader.take_new_faults()

    def _start_prefetcher(self) -> Prefetcher | None:
        files = self.shards.files
        if not isinstance(files, ShardCache) or self.first >= self.last:
            return None
        _, end = self.schedule.needs(self.last - 1)
        shards = self.shards
        return Prefetcher(files, lambda at: shards.info.shards[self.schedule.shard(at)], end, shards.prefetch)


def _collate(samples: list[tuple[Tensor, int, int]]) -> WorkerBatch:
    images, labels, ids = zip(*samples, strict=True)
    if is_encoded(images):
        return WorkerBatch(pack_records(images), np.array(labels), np.array(ids))
    pixels = stack_pixels(images) if images[0].dtype == torch.uint8 else default_collate(list(images))
    return WorkerBatch(pixels, np.array(labels), np.array(ids))
