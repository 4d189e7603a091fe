"""How an epoch's samples and shards spread over ranks, nodes and loader processes, computed without reading data."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive.config.sections import DataConfig
from adaptive.data.reading.order import epoch_order, locate, steps_per_epoch
from adaptive.data.reading.schedule import TrainSchedule
from adaptive.data.shards.index import SplitInfo


@dataclass(frozen=True)
class Shards:
    """The number of samples and the bytes of every shard of a split."""

    counts: tuple[int, ...]
    bytes: tuple[int, ...]

    @classmethod
    def of(cls, split: SplitInfo) -> Shards:
        """Take them from an index."""
        return cls(tuple(split.counts), tuple(shard.bytes for shard in split.shards))

    @classmethod
    def assumed(cls, images: int, shards: int, image_bytes: int) -> Shards:
        """Spread ``images`` of equal size evenly over ``shards``."""
        counts = tuple(images // shards + (i < images % shards) for i in range(shards))
        return cls(counts, tuple(count * image_bytes for count in counts))

    @property
    def images(self) -> int:
        """Samples in all shards."""
        return sum(self.counts)


@dataclass(frozen=True)
class DataPlan:
    """What ranks, loader processes and nodes read in one epoch, for one number of ranks.

    Attributes:
        world: ranks.
        micro_batch: images per rank and forward pass.
        steps: optimizer steps.
        images_per_rank: (least, most) images that a rank reads.
        dropped: images of the split's end that no step takes.
        opens: (least, mean, most) shards that a rank opens.
        opens_per_reader: (least, most) shards that one loader process opens.
        shards_per_node: (least, most) shards that a node's ranks touch; each node reads them whole.
        bytes_per_node: most bytes that a node reads: its shards, whole.
        window_bytes: most bytes of the shards that are in use at a time: what a cache has to hold at least.
    """

    world: int
    micro_batch: int
    steps: int
    images_per_rank: tuple[int, int]
    dropped: int
    opens: tuple[int, float, int]
    opens_per_reader: tuple[int, int]
    shards_per_node: tuple[int, int]
    bytes_per_node: int
    window_bytes: int


@dataclass(frozen=True)
class ResumeCost:
    """What continuing a run in the middle of an epoch costs.

    Attributes:
        step: the step it continues from.
        skipped: samples of the epoch that are already done; none of them is read again.
        shards_passed: shards whose samples are all done.
        shards_reopened: shards whose headers every reader scans anew: those of the step's windows.
        bytes_refetched: their bytes, which a node without a cache reads again.
        seconds: to compute the epoch's order and this position in it, measured here.
    """

    step: int
    skipped: int
    shards_passed: int
    shards_reopened: int
    bytes_refetched: int
    seconds: float


def simulate_epoch(
    shards: Shards, data: DataConfig, seed: int, global_batch: int, micro_batch: int, world: int, ranks_per_node: int,
    epoch: int = 0,
) -> DataPlan:  # fmt: skip
    """Compute one epoch's data plan, for all ranks at once (raises as `adaptive.data.reading.order` does).

    A rank's micro batch m of a global batch lies in the slots [(m * world + rank) * micro_batch, + micro_batch), and
    loader process w of n makes every n-th of its micro batches. A shard is opened once by whoever reads from it.
    """
    order = epoch_order(shards.counts, seed, epoch, data.shuffle_window)
    steps = steps_per_epoch(len(order), global_batch)
    used = order[: steps * global_batch]
    shard, _ = locate(used, shards.counts)
    slot = np.arange(len(used), dtype=np.int64) % global_batch // micro_batch
    rank = slot % world
    number = (
        np.arange(len(used), dtype=np.int64) // global_batch * (global_batch // micro_batch // world) + slot // world
    )
    readers = max(1, data.workers)
    reader = rank * readers + number % readers
    by_rank = _distinct(rank, shard, world, len(shards.counts))
    by_reader = _distinct(reader, shard, world * readers, len(shards.counts))
    node = rank // ranks_per_node
    nodes = -(-world // ranks_per_node)
    touched = np.zeros((nodes, len(shards.counts)), dtype=bool)
    touched[node, shard] = True
    images = np.bincount(rank, minlength=world)
    sizes = np.asarray(shards.bytes, dtype=np.int64)
    return DataPlan(
        world,
        micro_batch,
        steps,
        (int(images.min()), int(images.max())),
        shards.images - len(used),
        (int(by_rank.min()), float(by_rank.mean()), int(by_rank.max())),
        (int(by_reader.min()), int(by_reader.max())),
        (int(touched.sum(1).min()), int(touched.sum(1).max())),
        int((touched * sizes).sum(1).max()),
        window_bytes(shards, data, seed, global_batch, epoch),
    )


def window_bytes(shards: Shards, data: DataConfig, seed: int, global_batch: int, epoch: int = 0) -> int:
    """Return the most bytes of shards that one global batch reads from or prefetches."""
    schedule = _schedule(shards, data, seed, global_batch)
    window = data.shuffle_window
    prefetch = window if data.cache_ahead is None else data.cache_ahead
    sizes = np.asarray(shards.bytes, dtype=np.int64)
    order = np.array([schedule.shard(epoch * len(sizes) + position) for position in range(len(sizes))])
    ends = np.cumsum(sizes[order])
    most = 0
    for step in range(shards.images // global_batch):
        first, end = schedule.needs(epoch * (shards.images // global_batch) + step)
        first, end = first - epoch * len(sizes), min(end - epoch * len(sizes) + prefetch, len(sizes))
        most = max(most, int(ends[end - 1] - (ends[first - 1] if first else 0)))
    return most


def resume_cost(shards: Shards, data: DataConfig, seed: int, global_batch: int, share: float = 0.5) -> ResumeCost:
    """Return the cost of continuing after ``share`` of the first epoch's steps."""
    began = time.perf_counter()
    epoch_order(shards.counts, seed, 0, data.shuffle_window)
    schedule = _schedule(shards, data, seed, global_batch)
    step = int(steps_per_epoch(shards.images, global_batch) * share)
    first, end = schedule.needs(step)
    seconds = time.perf_counter() - began
    again = [schedule.shard(position) for position in range(first, end)]
    return ResumeCost(step, step * global_batch, first, end - first, sum(shards.bytes[s] for s in again), seconds)


def _schedule(shards: Shards, data: DataConfig, seed: int, global_batch: int) -> TrainSchedule:
    # Positions in the order of shards are the global batch's: the same for every rank and world size.
    return TrainSchedule(list(shards.counts), seed, data.shuffle_window, global_batch, global_batch, 0, 1, 1)


def _distinct(owner: NDArray[np.int64], shard: NDArray[np.int64], owners: int, shards: int) -> NDArray[np.int64]:
    """Return how many different shards every owner reads from, shape (owners,)."""
    pairs = np.unique(owner * shards + shard)
    return np.bincount(pairs // shards, minlength=owners)
