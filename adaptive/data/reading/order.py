"""The order of samples: pure functions of shard counts, seed and epoch; a rank takes its share of every global batch.

A sample's id is its number in the split: shard 0's samples first, then shard 1's, and so on. The order of an epoch is
the same on any number of ranks and workers; ranks take their slots of each global batch, so training at another world
size sees the same global batches in the same sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from adaptive.errors import ConfigError, DataError

Ids = NDArray[np.int64]


def epoch_order(counts: Sequence[int], seed: int, epoch: int, shuffle_window: int) -> Ids:
    """Return the ids of all samples in the order of one epoch, shape (sum(counts),).

    Shards are permuted, then samples within every ``shuffle_window`` consecutive shards, so that reading touches only
    that many shards at a time.
    """
    generator = _generator(seed, epoch)
    ends = np.cumsum(counts, dtype=np.int64)
    shards = generator.permutation(len(ends))
    parts = []
    for first in range(0, len(shards), shuffle_window):
        window = shards[first : first + shuffle_window]
        ids = [np.arange(ends[shard] - counts[shard], ends[shard], dtype=np.int64) for shard in window]
        parts.append(generator.permutation(np.concatenate(ids)))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def shard_order(shards: int, seed: int, epoch: int) -> Ids:
    """Return the order in which `epoch_order` takes the shards of an epoch, shape (shards,)."""
    return _generator(seed, epoch).permutation(shards)


def _generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))


def steps_per_epoch(total: int, global_batch: int) -> int:
    """Return the number of whole global batches in ``total`` samples (DataError when there is none)."""
    if total < global_batch:
        raise DataError(
            f"train.global_batch = {global_batch} is more than the {total} images of the training split; "
            f"lower it to {total} or less"
        )
    return total // global_batch


def accumulation_steps(global_batch: int, micro_batch: int, world: int) -> int:
    """Return the number of micro batches that each rank contributes to one global batch (ConfigError if uneven)."""
    share = micro_batch * world
    if micro_batch < 1 or world < 1 or global_batch % share:
        raise ConfigError(
            f"train.global_batch = {global_batch} is not divisible by train.micro_batch x ranks = "
            f"{micro_batch} x {world}"
        )
    return global_batch // share


def rank_batches(
    order: Ids, global_batch: int, micro_batch: int, rank: int, world: int, start_step: int = 0
) -> NDArray[np.int64]:
    """Return the ids of one rank's micro batches, shape (steps * accumulation, micro_batch), from ``start_step`` on.

    In each global batch, micro batch m of rank r takes the slots [(m * world + r) * micro_batch, + micro_batch); the
    last incomplete global batch is dropped.

    Raises:
        DataError: fewer samples than one global batch.
        ConfigError: the global batch is not divisible by micro_batch * world.
    """
    steps = steps_per_epoch(len(order), global_batch)
    accumulation = accumulation_steps(global_batch, micro_batch, world)
    slots = order[: steps * global_batch].reshape(steps, accumulation, world, micro_batch)
    return slots[start_step:, :, rank].reshape(-1, micro_batch)


def locate(ids: Ids, counts: Sequence[int]) -> tuple[Ids, Ids]:
    """Return the shard of every id and its position in that shard, both shaped like ``ids`` (IndexError if beyond)."""
    ends = np.cumsum(counts, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= total):
        raise IndexError(f"sample ids {ids.min()}..{ids.max()} are not all in 0..{total - 1}")
    shards = np.searchsorted(ends, ids, side="right")
    return shards, ids - (ends - np.asarray(counts, dtype=np.int64))[shards]


def evaluation_batches(total: int, batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """Return one rank's ids for a pass over ``total`` samples, shape (n, batch), padded with -1.

    Every sample occurs exactly once over all ranks, and n is the same on every rank.
    """
    rounds = -(-total // (batch * world))
    ids = np.full(rounds * world * batch, -1, dtype=np.int64)
    ids[:total] = np.arange(total)
    return ids.reshape(rounds, world, batch)[:, rank]
