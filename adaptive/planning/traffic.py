"""The network traffic of a training step: bytes that a rank sends, by collective, as DeepSpeed 0.19 issues them.

Ring algorithms (Patarasu and Yuan, 2009): of n bytes a rank sends (W - 1) / W * n in a reduce-scatter or an
all-gather, and twice that in an all-reduce. ZeRO (arXiv 1910.02054, section 7) counts reduce-scatter + all-gather for
stages 1 and 2; DeepSpeed reduces their gradients by all-reduce (``use_multi_rank_bucket_allreduce``), stage 2 after
every micro batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from adaptive.config.sections import Config
from adaptive.planning.memory import FP32, PLAIN_BUCKET, Sizes, ZeroSettings

Kind = Literal["all-reduce", "all-gather", "reduce-scatter"]
HELD_ELEMENTS = 1_000_000_000  # stage3_max_live_parameters and stage3_max_reuse_distance


@dataclass(frozen=True)
class Collective:
    """A kind of collective: its purpose, the bytes that all its calls of a step move together, and how many calls."""

    purpose: str
    kind: Kind
    bytes: int
    calls: int

    def sent(self, world: int) -> float:
        """Return the bytes that one of ``world`` ranks sends."""
        return (2 if self.kind == "all-reduce" else 1) * (world - 1) / world * self.bytes


def step_traffic(config: Config, settings: ZeroSettings, sizes: Sizes) -> list[Collective]:
    """Return the collectives of one optimizer step, all its micro batches together (none for a single rank)."""
    if settings.world == 1:
        return []
    learning, micros, stage = FP32 * sizes.learning, settings.accumulation, settings.stage
    bucket = FP32 * (settings.reduce_bucket if stage else PLAIN_BUCKET)
    calls = -(-learning // bucket)
    owned = FP32 * sum(sizes.slices(settings))
    found = []
    if stage < 3:
        times = micros if stage == 2 else 1
        found.append(Collective("gradients", "all-reduce", learning * times, calls * times))
        if stage:
            groups = len(sizes.groups)
            found.append(Collective("weights", "all-gather", owned * settings.world, groups))
    else:
        every = [*sizes.frozen, *(n for group in sizes.groups for n in group)]
        split = [n for n in every if n > settings.persistence]
        small = [n for n in every if n <= settings.persistence]
        padded = FP32 * sum(-(-n // settings.world) for n in split) * settings.world
        passes = gathers_per_micro_batch(sum(every)) * micros
        fetches = passes * max(1, -(-sum(split) // max(settings.prefetch_bucket, 1)))
        found += [
            Collective("weights", "all-gather", padded * passes, fetches),
            Collective("gradients", "reduce-scatter", owned * settings.world * micros, calls * micros),
        ]
        if small:
            padded = FP32 * sum(-(-n // settings.world) for n in small) * settings.world
            found.append(Collective("small weights", "all-gather", padded, 1))
        if config.train.ema_decay:
            found.append(Collective("moving average", "all-gather", FP32 * sum(split), 1))
    return found


def gathers_per_micro_batch(parameters: int) -> int:
    """Return how often ZeRO 3 gathers a weight for a micro batch.

    Once for forward and backward pass together while all of them may stay until they are used again, else twice.
    """
    return 1 if parameters <= HELD_ELEMENTS else 2


def bytes_sent(collectives: list[Collective], world: int) -> float:
    """Return the bytes that one rank sends per optimizer step."""
    return sum(collective.sent(world) for collective in collectives)
