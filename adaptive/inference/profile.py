"""Inference times: every block's own, that of a run with a policy, and what the policy's decisions cost.

Times are medians of rounds on one machine; each round measures everything once, so that what is compared was measured
side by side.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaptive.inference.acceleration.accelerated import Acceleration, Prepare
from adaptive.inference.acceleration.times import AcceleratedTimes, AcceleratedTurns
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from adaptive.inference.runner import DynamicClassifier
from adaptive.inference.timing import Spread, device_name, synchronize, timed
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast


@dataclass(frozen=True)
class BlockTime:
    """One block and its exit, at the full batch, in milliseconds per batch."""

    block: float
    exit: float


@dataclass(frozen=True)
class InferenceProfile:
    """What one batch takes. All times are in milliseconds per batch, medians over the rounds.

    Attributes:
        batch: images.
        blocks: every block and exit when nobody leaves.
        full: the plain forward pass of the network with all of its exits.
        backbone: the plain forward pass without the early exits; the same as ``full`` if the exits collaborate.
        dynamic: the runner with the policy.
        idle: the runner with a policy whose exits all decide and let nobody leave.
        still_in: share of the images that each block is run for.
        decisions: time of the decisions in a run with the policy; compaction included.
        ideal: sum over blocks of the share still in times that block's own time.
        overhead: dynamic / ideal, formed within the rounds.
        saving: dynamic / full, formed within the rounds.
        idle_overhead: idle / full, formed within the rounds.
        accelerated: accelerated runners, if any were asked for.
    """

    batch: int
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
) -> InferenceProfile:
    """Measure a policy on a batch, against the full network and against the ideal.

    Args:
        network: on its device.
        policy: of that network.
        images: (N, C, H, W), normalised: real ones, for they decide who leaves.
        rounds: the medians are over this many, after one to warm up.
        precision: as the runner takes it.
        accelerate: ways to accelerate the runner, by name, each measured beside the eager one.
    """
    dynamic = DynamicClassifier(network, policy, precision)
    nobody = policy.with_thresholds([NOBODY] * (policy.exits - 1) + [EVERYBODY])
    idle = DynamicClassifier(network, nobody, precision, decide_everywhere=True)
    straight = DynamicClassifier(network, nobody, precision)
    device, clock, shadow = dynamic.device, _Clock(dynamic.device), _Clock(dynamic.device)
    images = images.to(device)
    turns: list[tuple[str, Callable[[], object]]] = [
        ("full", lambda: full_forward(network, images, precision)),
        ("dynamic", lambda: dynamic.run(images)),
        ("idle", lambda: idle.run(images)),
        ("backbone", lambda: straight.run(images)),
    ]
    accelerated = [AcceleratedTurns(name, way, dynamic, images) for name, way in (accelerate or {}).items()]
    turns += [turn for pair in accelerated for turn in pair.turns]
    order = random.Random(0)
    measured: dict[str, list[float]] = defaultdict(list)
    blocks: list[list[BlockTime]] = []
    for round_ in range(rounds + 1):
        order.shuffle(turns)  # so that nothing always comes after the same
        times = {name: timed(call, device) for name, call in turns}
        shadow.start()
        idle.run(images, shadow)
        clock.start()
        dynamic.run(images, clock)
        if round_ == 0:
            continue
        times["decisions"] = sum(t for (part, _), t in clock.times.items() if part in ("decision", "compaction"))
        for name, value in times.items():
            measured[name].append(value)
        parts = range(len(network.blocks))
        blocks.append([BlockTime(shadow.times["block", i], shadow.times["exit", i]) for i in parts])
    still_in = [clock.samples.get(i, 0) / len(images) for i in range(len(network.blocks))]
    ideals = [sum(s * (b.block + b.exit) for s, b in zip(still_in, row, strict=True)) for row in blocks]
    middle = statistics.median
    return InferenceProfile(
        batch=len(images),
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
        ideal=middle(ideals),
        overhead=Spread.of_ratios(measured["dynamic"], ideals),
        saving=Spread.of_ratios(measured["dynamic"], measured["full"]),
        idle_overhead=Spread.of_ratios(measured["idle"], measured["full"]),
        accelerated=[pair.times(measured) for pair in accelerated],
    )


@torch.inference_mode()
def full_forward(network: AdaptiveNetwork, images: Tensor, precision: str) -> Tensor:
    """The last exit's logits, by the network's own forward pass."""
    with autocast(precision, images.device):
        return network(images)[-1]
