"""The probe of a `TimeModel`: the real runner, whose policy lets exactly as many images stay as a script says.

A script is a number of images for every block. Scripts are chosen such that every block is seen at every size after a
real compaction, and every compaction towards every size. Everything that a run does lies between two events of its
observer, so that the parts sum to the whole. Sizes between the smallest and the largest are drawn anew in every round:
kernels prefer some numbers of images, and a cache of them holds what it can, as when images leave by themselves.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from adaptive.inference.measuring.conditions import Conditions
from adaptive.inference.measuring.time_model import Asked, ExitTimes, TimeModel, grid
from adaptive.inference.measuring.timing import apart
from adaptive.inference.policy import Decision, Policy

Script = list[int]  # images in front of every block, and behind the last one
_IMAGES_A_ROUND = 16  # that a script runs for at least, so that small batches are measured more often


class Runs(Protocol):
    """A runner, see `adaptive.inference.runtimes`."""

    def run(self, images: Any, observe: Any = None) -> Any:
        """Run a batch of images."""


class _Masks:
    """Who leaves at each exit, in memory that numpy and torch share, or a copy of it on a GPU."""

    def __init__(self, exits: int, rows: int, device: torch.device) -> None:
        self.numpy = np.ones((exits, rows), dtype=np.bool_)
        self.torch = torch.from_numpy(self.numpy).to(device)
        self.rows = list(self.torch)


class Scripted(Policy):
    """A policy that decides as its kind does, and then lets exactly those leave that a script names.

    So decisions cost what they cost, and their number is known beforehand. `play` sets the script of the next run.
    """

    open: list[bool]
    """Whether images can leave, at every exit."""
    rows: int
    """The largest number of images, those that pad a batch included."""
    where: str = "cpu"
    """Device of the answers."""

    @classmethod
    def like(cls, policy: Policy, opened: Sequence[bool], rows: int, device: torch.device) -> Scripted:
        """A scripted policy of the same kind, temperatures and gates."""
        thresholds = [0.5] * (policy.exits - 1) + [0.0]
        given = policy.model_dump(include={"kind", "temperatures", "gates"})
        return cls(**given, thresholds=thresholds, open=list(opened), rows=rows, where=str(device))

    def can_fire(self, i: int) -> bool:
        """Whether any image could leave at exit i (from 0)."""
        return self.open[i]

    @cached_property
    def masks(self) -> _Masks:
        """Who leaves, by exit and row."""
        return _Masks(self.exits, self.rows, torch.device(self.where))

    def play(self, script: Script, generator: np.random.Generator) -> None:
        """Let so many images stay in the next run; which of them, chance decides."""
        masks = self.masks
        masks.numpy[:] = True
        for i, (here, stay) in enumerate(pairwise(script)):
            if here and i < self.exits - 1:
                masks.numpy[i, generator.permutation(here)[:stay]] = False
        if masks.torch.device.type != "cpu":
            masks.torch.copy_(torch.from_numpy(masks.numpy))

    def decide(self, i: int, probabilities: Any, memory: Any = None) -> Decision:
        """Say who leaves at exit i (from 0): those whom the script names."""
        labels, confidences, scores, _, after = super().decide(i, probabilities, memory)
        masks = self.masks
        row = masks.numpy[i] if isinstance(probabilities, np.ndarray) else masks.rows[i]
        return Decision(labels, confidences, scores, row[: len(probabilities)], after)


class Clock:
    """An observer that takes the time since the event before; on a GPU by its own clock, without waiting for it."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self._events: list[tuple[str, int, int]] = []
        self._marks: list[Any] = []

    def start(self) -> None:
        """Begin a run."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._events.clear()
        self._marks.clear()
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(self._now())

    def __call__(self, part: str, i: int, samples: int) -> None:
        """Take the time of an event."""
        self._mark()
        self._events.append((part, i, samples))

    def spent(self) -> list[tuple[str, int, int, float]]:
        """Events of the run, each with the milliseconds since the one before."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            times = [a.elapsed_time(b) for a, b in pairwise(self._marks)]
        else:
            times = [1000 * (b - a) for a, b in pairwise(self._marks)]
        return [(*event, spent) for event, spent in zip(self._events, times, strict=True)]


@dataclass(frozen=True)
class Contender:
    """A runner to be probed.

    Attributes:
        runner: of the network and ``policy``.
        policy: the scripted one.
        asked: what the runner does behind each block.
        conditions: that the times hold for; the batch is the probe's.
        device: of the runner.
        padded: sizes that batches are padded up to, where they are.
    """

    runner: Runs
    policy: Scripted
    asked: Asked
    conditions: Conditions
    device: torch.device
    padded: tuple[int, ...] = ()


def measure(
    contenders: Sequence[Contender],
    images: Any,
    batch: int,
    rounds: int,
    *,
    seed: int = 0,
    beside: Callable[[int], Sequence[Callable[[], object]]] | None = None,
) -> list[list[TimeModel]]:
    """Probe runners in turn, in a new order every round, after one round to warm up.

    Args:
        contenders: what to probe.
        images: (N, C, H, W), as the runners take them; batches are taken from them in turn.
        batch: images that arrive together.
        rounds: how many models to form.
        seed: of sizes, orders, and of who stays.
        beside: what else is to be measured in a round, by its number from 0: pieces, which are called one by one
            between the runs, so that what the machine does meanwhile hits both.

    Returns:
        For every contender one model per round.
    """
    order, generator = random.Random(seed), np.random.default_rng(seed)
    batches = batches_of(images, batch)
    found: list[list[TimeModel]] = [[] for _ in contenders]
    turns = list(range(len(contenders)))
    for number in range(-1, rounds):
        order.shuffle(turns)
        pieces = beside(number) if beside is not None and number >= 0 else []
        for place, turn in enumerate(turns):
            own = pieces[place * len(pieces) // len(turns) : (place + 1) * len(pieces) // len(turns)]
            model = _round(contenders[turn], batches, batch, generator, own)
            if number >= 0:
                found[turn].append(model)
    return found


def promise(models: Sequence[TimeModel], shares: Sequence[float], asked: Asked | None = None) -> float:
    """Milliseconds of an image by the models of several rounds: the median of what each of them says."""
    return statistics.median(model.mean(shares, asked) for model in models)


def repeats(models: Sequence[TimeModel], shares: Sequence[float], asked: Asked | None = None) -> float:
    """How far two halves of the rounds, every second one each, are apart in what they promise, as a share of it."""
    promises = [model.mean(shares, asked) for model in models]
    return apart(promises[::2], promises[1::2])


def batches_of(images: Any, batch: int) -> Iterator[Any]:
    """Batches of one size without end, in turn from images (N, C, H, W); repeated where they are too few."""
    if len(images) < batch:
        times = -(-batch // len(images))
        images = torch.cat([images] * times) if isinstance(images, Tensor) else np.concatenate([images] * times)
    while True:
        for start in range(0, len(images) - batch + 1, batch):
            yield images[start : start + batch]


def scripts(opened: Sequence[bool], sizes: Sequence[int]) -> list[Script]:
    """The scripts of a round: images in front of each of k blocks, and behind the last one none.

    Args:
        opened: (k,) where images can leave.
        sizes: rising numbers of images, the last one the batch.
    """
    ends = [i for i, fires in enumerate(opened[:-1]) if fires]
    plain = [[size] * len(ends) for size in reversed(sizes)]
    stays = dict.fromkeys(map(tuple, [*plain, *_ladders([0, *sizes], len(ends))]))
    return [_expanded(ends, len(opened), sizes[-1], list(row)) for row in stays]


def _ladders(ladder: Sequence[int], exits: int) -> Iterator[list[int]]:
    """Numbers that stay at each exit: one step down the ladder at every exit, from every step and exit on."""
    top = len(ladder) - 1
    for late in range(exits):
        yield [ladder[max(0, top - max(0, i - late + 1))] for i in range(exits)]
    for low in range(top - 1):
        yield [ladder[max(0, low - i)] for i in range(exits)]


def _expanded(ends: Sequence[int], exits: int, batch: int, stays: Sequence[int]) -> Script:
    """From what stays behind each open exit to what is in front of every block."""
    stay = dict(zip(ends, stays, strict=True))
    script = [batch]
    for i in range(exits - 1):
        script.append(stay.get(i, script[-1]))
    return [*script, 0]


def _sizes(contender: Contender, batch: int, generator: np.random.Generator) -> list[int]:
    """Sizes of a round: those that batches are padded to, or some around the model's grid."""
    if contender.padded:
        return [*(size for size in contender.padded if size < batch), batch]
    inner = [int(generator.integers(-(-3 * size // 4), 5 * size // 4 + 1)) for size in grid(batch)[1:-1]]
    return sorted({1, *(size for size in inner if size < batch), batch})


def _round(
    contender: Contender,
    batches: Iterator[Any],
    batch: int,
    generator: np.random.Generator,
    pieces: Sequence[Callable[[], object]],
) -> TimeModel:
    """Run every script of a round, in any order, and the pieces of other work between them; form a model of the times.

    Observing costs some microseconds a part, which is much of a small network's single image: every script is run
    without an observer as well, and the parts are scaled to what that took.
    """
    sizes = _sizes(contender, batch, generator)
    every = scripts(contender.asked.fires, sizes) * max(1, _IMAGES_A_ROUND // batch)
    clock, seen, called = Clock(contender.device), _Seen(), 0
    for place, number in enumerate(generator.permutation(len(every)), start=1):
        contender.policy.play(every[number], generator)
        images = next(batches)
        for observed in (True, False) if generator.random() < 0.5 else (False, True):
            clock.start()
            contender.runner.run(images, clock if observed else None)
            if observed:
                seen.add(every[number], clock.spent())
            else:
                clock("run", 0, batch)
                seen.bare += clock.spent()[0][-1]
        for piece in pieces[called : (called := place * len(pieces) // len(every))]:
            piece()
    return seen.model(contender, sizes)


class _Seen:
    """The times of a round, by part, exit and numbers of images; forms their means."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        self._picks: dict[int, list[tuple[int, int, float]]] = defaultdict(list)
        self._finish: list[float] = []
        self._observed = 0.0
        self.bare = 0.0
        """Milliseconds of the same scripts without an observer."""

    def add(self, script: Script, spent: Sequence[tuple[str, int, int, float]]) -> None:
        """Add what a run told."""
        self._observed += sum(milliseconds for *_, milliseconds in spent)
        for part, i, images, milliseconds in spent:
            if part == "finish":
                self._finish.append(milliseconds)
            elif part != "compaction":
                self._parts["block" if part == "stage" else part, i, images].append(milliseconds)
            elif images == script[i] or i == len(script) - 2:
                self._parts["ask", i, script[i]].append(milliseconds)
            else:
                self._picks[i].append((script[i], images, milliseconds))

    def model(self, contender: Contender, sizes: Sequence[int]) -> TimeModel:
        """The means as a model."""
        found = TimeModel(
            conditions=contender.conditions,
            parts=[self._exit(i, sizes) for i in range(len(contender.asked.fires))],
            finish=statistics.fmean(self._finish),
            steps=bool(contender.padded),
        )
        return found.scaled(self.bare / self._observed)

    def _exit(self, i: int, sizes: Sequence[int]) -> ExitTimes:
        lists = {part: self._table(part, i, sizes) for part in ("block", "exit", "decision", "ask")}
        # On top of what is spent where nobody leaves.
        extra: dict[int, list[float]] = defaultdict(list)
        for here, stay, milliseconds in self._picks[i]:
            extra[stay].append(milliseconds - statistics.fmean(self._parts["ask", i, here]))
        drop = statistics.fmean(extra.pop(0, [0.0]))
        known = sorted(extra)
        copies = [_line(known, [statistics.fmean(extra[m]) for m in known], size) for size in sizes] if known else []
        lists["block"] = lists["block"] or [0.0] * len(sizes)  # contained in a later stage
        return ExitTimes.model_validate({"sizes": list(sizes), "drop": drop, "pick": copies, **lists})

    def _table(self, part: str, i: int, sizes: Sequence[int]) -> list[float]:
        """Means by size; of the blocks that run for whole batches only that of the batch. None for no such part."""
        known = [size for size in sizes if (part, i, size) in self._parts]
        means = [statistics.fmean(self._parts[part, i, size]) for size in known]
        return [_line(known, means, size) for size in sizes] if known else []


def _line(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """Between points along straight lines, and along the last one beyond them."""
    if x > xs[-1] and len(xs) > 1:
        return float(ys[-1] + (ys[-1] - ys[-2]) * (x - xs[-1]) / (xs[-1] - xs[-2]))
    return float(np.interp(x, xs, ys))
