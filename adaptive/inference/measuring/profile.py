"""Inference times: every block's own, that of a run with a policy, and what the policy's decisions cost.

Times are medians of rounds on one machine; each round measures everything once, so that what is compared was measured
side by side.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adaptive.inference.acceleration.accelerated import Acceleration, Prepare
from adaptive.inference.acceleration.times import AcceleratedTimes, AcceleratedTurns
from adaptive.inference.measuring.side_by_side import batches, of_round
from adaptive.inference.measuring.timing import Spread, device_name, synchronize, timed
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from adaptive.inference.runner import DynamicClassifier
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast


@dataclass(frozen=True)
class BlockTime:
    """One block and its exit, at the full batch, in milliseconds per batch."""

    block: float
    exit: float


@dataclass(frozen=True)
class InferenceProfile:
    """What a batch takes. All times are in milliseconds per batch, medians over the rounds.

    Attributes:
        batch: images.
        images: different ones that were run, in batches.
        blocks: every block and exit when nobody leaves.
        full: the plain forward pass of the network with all of its exits.
        backbone: the plain forward pass without the early exits; the same as ``full`` if the exits collaborate.
        dynamic: the runner with the policy.
        idle: the runner with a policy whose exits all decide and let nobody leave.
        still_in: share of the images that each block is run for.
        decisions: time of the decisions in a run with the policy; compaction included.
        ideal: sum over blocks of the share still in times that block's own time, of the same images.
        overhead: dynamic / ideal, formed within the rounds.
        saving: dynamic / full, formed within the rounds.
        idle_overhead: idle / full, formed within the rounds.
        accelerated: accelerated runners, if any were asked for.
    """

    batch: int
    images: int
    blocks: list[BlockTime]
    full: float
    backbone: float
    dynamic: float
    idle: float
    still_in: list[float]
    decisions: float
    ideal: float
    overhead: Spread
    saving: Spread
    idle_overhead: Spread
    accelerated: list[AcceleratedTimes] = field(default_factory=list)

    @property
    def milliseconds(self) -> list[float]:
        """Cumulative time of one image up to each exit at this batch size."""
        total, cumulative = 0.0, []
        for part in self.blocks:
            total += (part.block + part.exit) / self.batch
            cumulative.append(total)
        return cumulative


class _Clock:
    """An observer that takes the time of every part of a run."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.times: dict[tuple[str, int], float] = defaultdict(float)
        self.samples: dict[int, int] = {}
        self._last = 0.0

    def start(self) -> None:
        """Begin a run."""
        self.times.clear()
        self.samples.clear()
        synchronize(self._device)
        self._last = time.perf_counter()

    def __call__(self, part: str, i: int, samples: int) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.times[part, i] += 1000 * (now - self._last)
        self._last = now
        if part == "block":
            self.samples[i] = samples


def machine_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor and the number of threads."""
    if device.type == "cuda":
        return device_name(device)
    threads = torch.get_num_threads()
    return f"{device_name(device)}, {threads} thread{'s' if threads > 1 else ''}"


def profile(
    network: AdaptiveNetwork,
    policy: Policy,
    images: Tensor,
    rounds: int = 10,
    precision: str = "fp32",
    accelerate: Mapping[str, Acceleration | Prepare] | None = None,
    batch: int | None = None,
) -> InferenceProfile:
    """Measure a policy on batches of images, against the full network and against the ideal.

    Args:
        network: on its device.
        policy: of that network.
        images: (N, C, H, W), normalised: real ones, for they decide who leaves.
        rounds: the medians are over this many; each takes its part of the images.
        precision: as the runner takes it.
        accelerate: ways to accelerate the runner, by name, each measured beside the eager one.
        batch: images of a batch, which they are cut into; by default all of them.
    """
    dynamic = DynamicClassifier(network, policy, precision)
    nobody = policy.with_thresholds([NOBODY] * (policy.exits - 1) + [EVERYBODY])
    idle = DynamicClassifier(network, nobody, precision, decide_everywhere=True)
    straight = DynamicClassifier(network, nobody, precision)
    device, clock, shadow = dynamic.device, _Clock(dynamic.device), _Clock(dynamic.device)
    calls: list[Tensor] = batches(images.to(device), batch or len(images))
    turns: list[tuple[str, Callable[[Tensor], object]]] = [
        ("full", lambda call: full_forward(network, call, precision)),
        ("dynamic", dynamic.run),
        ("idle", idle.run),
        ("backbone", straight.run),
    ]
    accelerated = [AcceleratedTurns(name, way, dynamic, calls) for name, way in (accelerate or {}).items()]
    turns += [turn for pair in accelerated for turn in pair.turns]
    order, middle, mean = random.Random(0), statistics.median, statistics.mean
    measured: dict[str, list[float]] = defaultdict(list)
    blocks: list[list[BlockTime]] = []
    still_in = _still_in(dynamic, calls, clock)  # warms up as well
    for _, run in turns:
        run(calls[0])
    for round_ in range(rounds):
        chosen = [calls[number] for number in of_round(round_, rounds, len(calls))]
        order.shuffle(turns)  # so that nothing always comes after the same
        for name, run in turns:
            measured[name].append(mean(timed(partial(run, call), device) for call in chosen))
        parts = [_observed(dynamic, idle, call, clock, shadow) for call in chosen]
        for name in ("decisions", "ideal"):
            measured[name].append(mean(getattr(part, name) for part in parts))
        rows = zip(*(part.blocks for part in parts), strict=True)
        blocks.append([BlockTime(mean(b.block for b in row), mean(b.exit for b in row)) for row in rows])
    return InferenceProfile(
        batch=len(calls[0]),
        images=min(len(images), sum(map(len, calls))),
        blocks=[
            BlockTime(middle(r[i].block for r in blocks), middle(r[i].exit for r in blocks))
            for i in range(len(still_in))
        ],
        full=middle(measured["full"]),
        backbone=middle(measured["backbone"]),
        dynamic=middle(measured["dynamic"]),
        idle=middle(measured["idle"]),
        still_in=still_in,
        decisions=middle(measured["decisions"]),
        ideal=middle(measured["ideal"]),
        overhead=Spread.of_ratios(measured["dynamic"], measured["ideal"]),
        saving=Spread.of_ratios(measured["dynamic"], measured["full"]),
        idle_overhead=Spread.of_ratios(measured["idle"], measured["full"]),
        accelerated=[pair.times(measured) for pair in accelerated],
    )


class _Parts(NamedTuple):
    """Of one batch: the blocks when nobody leaves, the decisions with the policy, and the ideal."""

    blocks: list[BlockTime]
    decisions: float
    ideal: float


def _still_in(dynamic: DynamicClassifier, calls: Sequence[Tensor], clock: _Clock) -> list[float]:
    """Return the share of the images of all batches that each block is run for."""
    inside = [0] * len(dynamic.network.blocks)
    for call in calls:
        clock.start()
        dynamic.run(call, clock)
        inside = [count + clock.samples.get(i, 0) for i, count in enumerate(inside)]
    return [count / sum(map(len, calls)) for count in inside]


def _observed(
    dynamic: DynamicClassifier, idle: DynamicClassifier, call: Tensor, clock: _Clock, shadow: _Clock
) -> _Parts:
    shadow.start()
    idle.run(call, shadow)
    clock.start()
    dynamic.run(call, clock)
    blocks = [BlockTime(shadow.times["block", i], shadow.times["exit", i]) for i in range(len(dynamic.network.blocks))]
    shares = [clock.samples.get(i, 0) / len(call) for i in range(len(blocks))]
    return _Parts(
        blocks,
        sum(t for (part, _), t in clock.times.items() if part in ("decision", "compaction")),
        sum(share * (b.block + b.exit) for share, b in zip(shares, blocks, strict=True)),
    )


@torch.inference_mode()
def full_forward(network: AdaptiveNetwork, images: Tensor, precision: str) -> Tensor:
    """The last exit's logits, by the network's own forward pass."""
    with autocast(precision, images.device):
        return network(images)[-1]
