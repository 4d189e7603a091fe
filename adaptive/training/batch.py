"""Batch arithmetic, in one place: global batch = ranks x micro batch x accumulation."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive.config.sections import TrainConfig
from adaptive.errors import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """Images per optimizer step, per rank and forward pass, and forward passes per step."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world: int


def batch_sizes(train: TrainConfig, world: int) -> BatchSizes:
    """Divide the global batch over ranks and micro batches (raises ConfigError where it does not divide)."""
    total, micro = train.global_batch, train.micro_batch
    if micro is None:
        if total % world:
            raise ConfigError(
                f"train.global_batch = {total} is not divisible by {world} ranks; "
                f"use {_nearest_multiple(total, world)} or another number of ranks"
            )
        return BatchSizes(total, total // world, 1, world)
    if total % (micro * world):
        raise ConfigError(
            f"train.global_batch = {total} is not divisible by {world} ranks x train.micro_batch = {micro}; "
            f"use train.global_batch={_nearest_multiple(total, micro * world)} or another train.micro_batch"
        )
    return BatchSizes(total, micro, total // (micro * world), world)


def _nearest_multiple(number: int, divisor: int) -> int:
    return max(divisor, round(number / divisor) * divisor)
