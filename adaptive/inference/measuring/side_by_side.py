"""Networks side by side: times of whole answers, measured in one process and interleaved, with what was answered.

Every round measures every contender twice, in shuffled order, on the same part of the images. So ratios are formed of
what was measured within a second or so, and how far a contender differs from itself says how fine they may be read.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from adaptive.inference.intervals import wilson
from adaptive.inference.measuring.timing import Spread, apart, timed
from adaptive.inference.runtimes import Runner

Part = Literal["policy", "full"]
NOISE = 0.05  # relative: a contender that differs from itself by more is too noisy for finer comparisons
_TWICE = 2


@dataclass(frozen=True)
class Contender:
    """A network in some runtime that answers images.

    Attributes:
        target: number of what was given, from 0.
        name: what it is called.
        runtime: what runs it.
        precision: that it computes in.
        part: ``policy`` with its policy, ``full`` to the end, where no decision is made.
        runner: that answers.
        images: (N, C, H, W), as and where the runner takes them.
        labels: (N,) their classes.
        device: where it computes.
    """

    target: int
    name: str
    runtime: str
    precision: str
    part: Part
    runner: Runner
    images: Any
    labels: NDArray[np.int64]
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of a contender at a batch size. Times are in milliseconds.

    Attributes:
        target: its name.
        runtime: what ran it.
        precision: that it computed in.
        part: ``policy`` or ``full``, see `Contender`.
        batch: images of a call.
        images: different images that were answered; all were timed.
        calls: that were timed.
        mean: of a call.
        p50: median of the calls.
        p95: percentile of the calls.
        p99: percentile of the calls.
        milliseconds: mean of an image.
        images_per_second: its inverse.
        top1: accuracy on these images in percent.
        top1_interval: its 95 % interval.
        shares: (k,) of these images that left at each exit.
        of_full: time as a share of the same target's full network in the same runtime, formed within the rounds.
        of_first: time as a share of the first contender's, formed within the rounds.
        repeats: relative difference between its two measurements, medians over the rounds.
    """

    target: str
    runtime: str
    precision: str
    part: Part
    batch: int
    images: int
    calls: int
    mean: float
    p50: float
    p95: float
    p99: float
    milliseconds: float
    images_per_second: float
    top1: float
    top1_interval: tuple[float, float]
    shares: list[float]
    of_full: Spread | None
    of_first: Spread
    repeats: float

    @property
    def noisy(self) -> bool:
        """Whether it differs from itself by more than ratios may be read to."""
        return self.repeats > NOISE


def batches(images: Any, batch: int) -> list[Any]:
    """Cut images (N, ...) into as many whole batches as they fill; fewer than one are repeated to fill it."""
    count = len(images)
    if count < batch:
        rows = np.arange(batch) % count
        return [images[rows]]
    return [images[start : start + batch] for start in range(0, count - batch + 1, batch)]


def of_round(round_: int, rounds: int, count: int) -> list[int]:
    """Numbers of those of ``count`` batches that a round measures: over all rounds each comes, about equally often."""
    return list(range(round_, count, rounds)) if count >= rounds else [round_ % count]


def measure(contenders: Sequence[Contender], batch: int, rounds: int, seed: int = 0) -> list[Row]:
    """Measure contenders at a batch size; each answers all of its images once before, which prepares what it needs.

    Args:
        contenders: the first one is what others are compared with.
        batch: images of a call.
        rounds: each image is timed in one of them, or in several where there are fewer batches than rounds.
        seed: of the order.

    Raises:
        DataError: images that hold NaN or infinite values.
        ModelError: an answer is NaN or infinite.
    """
    lanes = [_Lane(contender, batch) for contender in contenders]
    order = random.Random(seed)
    for round_ in range(rounds):
        turns = [(lane, half) for lane in lanes for half in range(_TWICE)]
        order.shuffle(turns)  # so that nothing always comes after the same
        for lane, half in turns:
            lane.turn(half, of_round(round_, rounds, len(lane.calls)))
    full = {(c.target, c.runtime): lane for c, lane in zip(contenders, lanes, strict=True) if c.part == "full"}
    return [lane.row(lanes[0], full.get((c.target, c.runtime))) for c, lane in zip(contenders, lanes, strict=True)]


class _Lane:
    """A contender, its calls, what it answered, and per half and round the times of that round's calls."""

    def __init__(self, contender: Contender, batch: int) -> None:
        self._of, self._batch = contender, batch
        self.calls = batches(contender.images, batch)
        labels, exits = [], []
        for call in self.calls:
            probabilities, left_at = contender.runner.run(call)
            labels.append(np.asarray(torch.as_tensor(probabilities).argmax(1).cpu()))
            exits.append(np.asarray(torch.as_tensor(left_at).cpu()))
        self._images = min(len(contender.images), batch * len(self.calls))
        self._labels, self._exits = (np.concatenate(part)[: self._images] for part in (labels, exits))
        self._times: tuple[list[list[float]], list[list[float]]] = ([], [])

    def turn(self, half: int, numbers: Sequence[int]) -> None:
        """Time some calls; one before them is not timed: another contender's weights were in the caches."""
        run, device = self._of.runner.run, self._of.device
        run(self.calls[numbers[0] - 1])
        self._times[half].append([timed(partial(run, self.calls[number]), device) for number in numbers])

    @property
    def per_round(self) -> list[float]:
        """Milliseconds of an image, one number per round."""
        return [statistics.mean([*a, *b]) / self._batch for a, b in zip(*self._times, strict=True)]

    def row(self, first: _Lane, full: _Lane | None) -> Row:
        """Sum up, compared with the first lane and with that of the full network."""
        of = self._of
        times = [t for half in self._times for turn in half for t in turn]
        mean = statistics.mean(times)
        p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist()
        right = int((self._labels == of.labels[: self._images]).sum())
        counts = np.bincount(self._exits - 1, minlength=of.runner.policy.exits)
        return Row(
            target=of.name,
            runtime=of.runtime,
            precision=of.precision,
            part=of.part,
            batch=self._batch,
            images=self._images,
            calls=len(times),
            mean=mean,
            p50=p50,
            p95=p95,
            p99=p99,
            milliseconds=mean / self._batch,
            images_per_second=1000 * self._batch / mean,
            top1=100 * right / self._images,
            top1_interval=wilson(right, self._images),
            shares=(counts / self._images).tolist(),
            of_full=None if full is None else Spread.of_ratios(self.per_round, full.per_round),
            of_first=Spread.of_ratios(self.per_round, first.per_round),
            repeats=apart(*([statistics.mean(turn) for turn in half] for half in self._times)),
        )
