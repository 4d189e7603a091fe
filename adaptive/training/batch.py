"""Batch arithmetic, in one place: global batch = ranks x micro batch x accumulation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from math import isqrt

from adaptive.config.sections import Config
from adaptive.errors import ConfigError

ENOUGH = 2  # images of a micro batch that every network can train with: BatchNorm needs two


@dataclass(frozen=True)
class BatchSizes:
    """Images per optimizer step, per rank and forward pass, and forward passes per step.

    ``limit`` is what train.micro_batch allows a rank to hold in a forward pass, None where it is not set.
    """

    global_batch: int
    micro_batch: int
    accumulation: int
    world: int
    limit: int | None = None

    @property
    def share(self) -> int:
        """Images of a rank per optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def derived(self) -> str:
        """A line that tells where the micro batch is less than train.micro_batch, and why; else empty."""
        if self.limit is None or self.limit == self.micro_batch:
            return ""
        if self.accumulation == 1:
            return f"train.micro_batch = {self.limit} is more than the {self.share} images of a rank, taken in one pass"
        return (
            f"train.micro_batch = {self.limit}: the {self.share} images of a rank divide into {self.micro_batch} per "
            f"forward pass at most, in {self.accumulation} passes"
        )


def batch_sizes(config: Config, world: int, global_batch: int | None = None) -> BatchSizes:
    """Divide the global batch (the configuration's, or another one) over ranks and micro batches.

    The micro batch is the largest that train.micro_batch allows.

    Raises:
        ConfigError: it cannot be divided; names the largest number of ranks that can share it.
    """
    total = global_batch or config.train.global_batch
    share = total // world
    micro = 0 if total % world else largest_micro_batch(config, share)
    if not micro:
        raise ConfigError(_undivided(config, total, world))
    return BatchSizes(total, micro, share // micro, world, config.train.micro_batch)


def largest_micro_batch(config: Config, share: int, limit: int | None = None) -> int:
    """Return the largest micro batch into which a rank's ``share`` of a global batch divides, 0 where there is none.

    None is above ``limit`` (by default train.micro_batch). Where images are mixed they are even: the images of a micro
    batch are paired.
    """
    limit, step = limit or config.train.micro_batch or share, _step(config)
    if limit >= share:
        return 0 if share % step else share
    return next((n for n in range(limit, 0, -1) if share % n == 0 and n % step == 0), 0)


def most_ranks(config: Config, below: int, total: int | None = None) -> int | None:
    """Return the largest number of ranks below ``below`` that share the global batch with two images or more each.

    Two per forward pass; None where there is no such number.
    """
    total = total or config.train.global_batch
    return next((n for n in range(min(below - 1, total), 0, -1) if _divides(config, total, n)), None)


def next_micro_batch(config: Config, batch: BatchSizes) -> int | None:
    """Return the smallest micro batch above the taken one into which a rank's images divide, None where it has all."""
    return next((n for n in micro_batches(config, batch.share) if n > batch.micro_batch), None)


def micro_batches(config: Config, share: int) -> list[int]:
    """Return all micro batches into which a rank's ``share`` of a global batch divides, in rising order."""
    pairs = ((n, share // n) for n in range(1, isqrt(share) + 1) if share % n == 0)
    return sorted({n for pair in pairs for n in pair if n % _step(config) == 0})


def _divides(config: Config, total: int, world: int) -> bool:
    """Say whether every rank gets micro batches of two images or more, or of as many as train.micro_batch allows."""
    if total % world:
        return False
    return largest_micro_batch(config, total // world) >= min(ENOUGH, config.train.micro_batch or ENOUGH)


def _undivided(config: Config, total: int, world: int) -> str:
    limit, step = config.train.micro_batch, _step(config)
    if limit is not None and limit < step:
        return (
            f"train.micro_batch = {limit}: data.mixup and data.cutmix pair the images of a micro batch; use "
            f"train.micro_batch={step} or more"
        )
    reason = f"is not divisible by {ranks_in_words(world)}"
    if total % world == 0:
        reason = (
            f"gives each of {ranks_in_words(world)} {total // world} image(s), but data.mixup and data.cutmix pair the "
            "images of a micro batch, whose number has to be even"
        )
    fewer = most_ranks(config, world, total)
    ranks = f"{ranks_in_words(fewer)}, the largest number that gives each two images, or " if fewer else ""
    better = next(n * world for n in _nearest(total / world) if _divides(config, n * world, world))
    return f"train.global_batch = {total} {reason}; use {ranks}train.global_batch={better}"


def _step(config: Config) -> int:
    return 2 if config.data.mixup > 0 or config.data.cutmix > 0 else 1


def ranks_in_words(number: int) -> str:
    """Return the number with its noun."""
    return f"{number} rank{'s' if number != 1 else ''}"


def _nearest(wanted: float) -> Iterator[int]:
    """Yield the whole numbers from 1 on, the nearest first."""
    for distance in count():
        yield from (n for n in sorted({round(wanted) - distance, round(wanted) + distance}) if n > 0)
