"""A rank's batches by number: the samples of each, and which shards it reads, by their position in the order of use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive.data.reading.order import epoch_order, locate, rank_batches, shard_order


class Schedule(Protocol):
    """The batches of one rank, numbered from 0, and the order in which they read the shards."""

    def batch(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """Return the epoch of a batch and its sample ids, -1 for padding."""

    def needs(self, number: int) -> tuple[int, int]:
        """Return the range [first, end) of positions, in the order of the shards, that a batch reads from."""

    def shard(self, position: int) -> int:
        """Return the shard at a position of that order."""


@dataclass
class TrainSchedule:
    """Training batches over all epochs; the order of the shards is each epoch's own, one epoch after another."""

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
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def batch(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """Return the epoch of a batch and its sample ids, shape (micro_batch,)."""
        epoch, micro_batch = divmod(number, self._per_epoch)
        if self._batches is None or epoch != self._epoch:
            order = epoch_order(self.counts, self.seed, epoch, self.shuffle_window)
            self._batches = rank_batches(order, self.global_batch, self.micro_batch, self.rank, self.world)
            self._epoch = epoch
        return epoch, self._batches[micro_batch]

    def needs(self, number: int) -> tuple[int, int]:
        """Return the positions of the shuffle windows that the global batch of this micro batch reads from."""
        epoch, micro_batch = divmod(number, self._per_epoch)
        first = micro_batch // self.accumulation * self.global_batch
        ends = np.cumsum(np.asarray(self.counts)[self._order(epoch)])
        low, high = np.searchsorted(ends, [first, first + self.global_batch - 1], side="right").tolist()
        base, window = epoch * len(self.counts), self.shuffle_window
        return base + low // window * window, base + min((high // window + 1) * window, len(self.counts))

    def shard(self, position: int) -> int:
        """Return the shard at a position, counted over all epochs."""
        epoch, within = divmod(position, len(self.counts))
        return int(self._order(epoch)[within])

    @property
    def _per_epoch(self) -> int:
        return sum(self.counts) // self.global_batch * self.accumulation

    def _order(self, epoch: int) -> NDArray[np.int64]:
        # The prefetching thread asks too; at most two epochs are in use at a time.
        order = self._orders.get(epoch)
        if order is None:
            order = shard_order(len(self.counts), self.seed, epoch)
            self._orders = {**{e: o for e, o in self._orders.items() if abs(e - epoch) < 2}, epoch: order}
        return order


@dataclass
class EvaluationSchedule:
    """The batches of one pass over a split, its shards in the order of the index."""

    counts: list[int]
    ids: NDArray[np.int64]

    def batch(self, number: int) -> tuple[int, NDArray[np.int64]]:
        """Return 0 and the sample ids of a batch, shape (batch,)."""
        return 0, self.ids[number]

    def needs(self, number: int) -> tuple[int, int]:
        """Return the range of shards that a batch reads from, empty for nothing but padding."""
        real = self.ids[number][self.ids[number] >= 0]
        if not len(real):
            return len(self.counts), len(self.counts)
        shards, _ = locate(real[[0, -1]], self.counts)
        return int(shards[0]), int(shards[1]) + 1

    def shard(self, position: int) -> int:
        """Return the shard at a position: the one of that number."""
        return position
