"""Batches of training and evaluation images, from shards or memory, on any number of ranks and workers.

The order comes from `adaptive.data.reading.order`. Worker w of n makes every n-th batch, and the loader takes the
workers in turn, so the batches do not depend on n. Samples are read by offset: nothing is read twice or skipped over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from adaptive.config.sections import DataConfig
from adaptive.data.faults import Ledger
from adaptive.data.images.crop_flip import CropFlipDraws, DrawnBy
from adaptive.data.images.encoded import BatchDecoder
from adaptive.data.images.nvjpeg import nvjpeg_decoder
from adaptive.data.images.transforms import crop_padding
from adaptive.data.reading.in_memory import DecodedSplit
from adaptive.data.reading.in_memory_source import CropFlip, InMemorySource
from adaptive.data.reading.loading import Batch as Batch
from adaptive.data.reading.loading import LoaderOptions as LoaderOptions
from adaptive.data.reading.loading import Loading, Source, load_batches
from adaptive.data.reading.order import accumulation_steps, evaluation_batches, steps_per_epoch
from adaptive.data.reading.pipeline import BatchSource, SampleTransform, SplitShards
from adaptive.data.reading.samples import PADDING as PADDING  # label and id of rows that hold no sample
from adaptive.data.reading.schedule import EvaluationSchedule, TrainSchedule
from adaptive.data.shards.index import DatasetIndex

SINGLE_PROCESS = LoaderOptions()


class TrainStream:
    """Endless augmented training batches, which start at any optimizer step, counted from 0 over all epochs.

    A bad sample is replaced by the next readable one (data.max_bad); ``bad`` is the ledger of what this rank met.

    Args:
        index: of the dataset at ``data.path``.
        data: how it is read and augmented.
        split: its split.
        loader: who loads, and where batches go.
        seed: of order and augmentation.
        global_batch: images of one optimizer step, over all ranks.
        micro_batch: images of one batch.
        decoded: the split in memory, where batches are then taken from, without loader processes; they are the same.
        drawn_by: how crop and flip are drawn, where data.crop is pad or none.

    Raises:
        DataError: the split or a shard is missing, or it holds fewer images than one global batch.
        ConfigError: global_batch is not divisible by micro_batch * world, an augmentation is unknown, or the cache of
            a URL cannot hold data.shuffle_window shards.
        MachineError: data.decoder is cuda, and there is no CUDA device or no TorchCodec.
    """

    def __init__(
        self,
        index: DatasetIndex,
        data: DataConfig,
        split: str,
        loader: LoaderOptions = SINGLE_PROCESS,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        decoded: DecodedSplit | None = None,
        drawn_by: DrawnBy = "epoch",
    ) -> None:
        self._shards = SplitShards.of(index, data, split, data.shuffle_window, check=loader.world == 1)
        info = index.split(split)
        loader = _without_workers(loader) if decoded is not None else loader
        self.bad = Ledger(data.max_bad)
        self.steps_per_epoch = steps_per_epoch(info.count, global_batch)
        self.accumulation = accumulation_steps(global_batch, micro_batch, loader.world)
        self._schedule = TrainSchedule(
            info.counts, seed, data.shuffle_window, global_batch, micro_batch, loader.rank, loader.world,
            self.accumulation,
        )  # fmt: skip
        self._decoded, self._transform = decoded, SampleTransform.for_training(data, seed, info.count, drawn_by)
        self._crop = CropFlip(CropFlipDraws(seed, info.count), crop_padding(data), data.flip)
        self._loading = Loading.of(data, micro_batch, loader)
        if data.decoder == "cuda":
            decoder = BatchDecoder(data.image_size, loader.device, nvjpeg_decoder(loader.device))
            self._loading = replace(self._loading, decoder=decoder)

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield this rank's micro batches of the steps [first_step, last_step), ``accumulation`` for each.

        Epochs (step // steps_per_epoch) follow one another in the same workers; closing the iterator ends them.

        Raises:
            DataError: a sample cannot be read; names its shard and key. With data.max_bad: more samples than that.
            MachineError: a worker process died, or the cache cannot be written.
        """
        first, last = first_step * self.accumulation, last_step * self.accumulation
        source: Source = BatchSource(self._schedule, first, last, self._shards, self._transform, replace_bad=True)
        if self._decoded is not None:
            source = InMemorySource(self._schedule, first, last, self._decoded, self._crop)
        yield from load_batches(source, self._loading, self.bad)


class EvaluationStream:
    """One deterministic pass per iteration: every image once over all ranks, equally many batches on each.

    Bad samples are left out (data.max_bad): label and id are -1 instead. ``bad`` is the ledger of what this rank met in
    all passes, ``left_out`` counts those of the latest pass, by kind.

    Args:
        index: of the dataset at ``data.path``.
        data: how it is read and transformed.
        split: its split.
        loader: who loads, and where batches go.
        batch: images of one batch.
        decoded: the split in memory, where batches are then taken from, without loader processes; they are the same.

    Raises:
        DataError: the split or a shard is missing.
    """

    def __init__(
        self,
        index: DatasetIndex,
        data: DataConfig,
        split: str,
        loader: LoaderOptions = SINGLE_PROCESS,
        *,
        batch: int,
        decoded: DecodedSplit | None = None,
    ) -> None:
        self._shards = SplitShards.of(index, data, split, 2, check=loader.world == 1)
        info = index.split(split)
        self.total = info.count
        loader = _without_workers(loader) if decoded is not None else loader
        self.bad = Ledger(data.max_bad)
        self._pass = Ledger(data.max_bad)
        ids = evaluation_batches(info.count, batch, loader.rank, loader.world)
        self._schedule = EvaluationSchedule(info.counts, ids)
        self._decoded, self._transform = decoded, SampleTransform.for_evaluation(data)
        self._loading = Loading.of(data, batch, replace(loader, workers=min(loader.workers, len(ids))))

    @property
    def left_out(self) -> dict[str, int]:
        """Samples that the latest pass left out on this rank, by kind."""
        return self._pass.by_kind

    def __len__(self) -> int:
        return len(self._schedule.ids)

    def __iter__(self) -> Iterator[Batch]:
        self._pass = Ledger(self.bad.limit)
        source: Source
        if self._decoded is None:
            source = BatchSource(self._schedule, 0, len(self), self._shards, self._transform, replace_bad=False)
            if self._loading.workers:  # they end with each pass
                source.scan_headers()
        else:
            source = InMemorySource(self._schedule, 0, len(self), self._decoded, None)
        yield from load_batches(source, self._loading, self.bad, self._pass)


def _without_workers(loader: LoaderOptions) -> LoaderOptions:
    """Return the loader of a split in memory: to hand a batch over takes a process longer than to make it."""
    return replace(loader, workers=0)
