"""A model of time: what a policy costs in milliseconds, from the times of every part at several numbers of images.

In a batch of B images block i runs for those that are still in. If images come in no order, their number n_i follows
the binomial distribution of B images and of s_i, the share still in; so the time of a batch is the sum over the parts
of E[t_i(n_i)], and not of s_i t_i(B): a block has a price of its own however few images it runs for. The expectation is
formed exactly. What is copied when images leave depends on two numbers, who was in and who stays, by their joint law.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from adaptive.inference.frozen_model import FrozenModel
from adaptive.inference.measuring.conditions import Conditions
from adaptive.inference.policy import Policy

Array = NDArray[np.float64]

_STEP = 1e-4  # share of the images that moves to another exit, for prices
_RISE = 1e-6  # relative: how much an exit costs more than the one before, at least


class Asked(NamedTuple):
    """What a runner does behind each of k blocks.

    Attributes:
        computed: whether the exit is computed.
        decides: whether its answers are scored.
        fires: whether images can leave there; at the last exit all do.
    """

    computed: list[bool]
    decides: list[bool]
    fires: list[bool]

    @classmethod
    def everywhere(cls, exits: int) -> Asked:
        """Every one of k exits is asked."""
        return cls([True] * exits, [True] * exits, [True] * exits)

    @classmethod
    def of_policy(cls, policy: Policy, collaboration: bool = False) -> Asked:
        """What a runner asks for a policy; ``collaboration``: an exit takes the answer of the one before."""
        fires = [*(policy.can_fire(i) for i in range(policy.exits - 1)), True]
        remembers = policy.needs_every_exit and any(fires[:-1])
        decides = [fire or remembers for fire in fires]
        return cls([one or collaboration for one in decides], decides, fires)


class ExitTimes(FrozenModel):
    """Milliseconds that a block and what belongs to its exit take for several numbers of images, one per size.

    A part that a runtime does not tell from the block is an empty list, and contained in the block.
    """

    sizes: Annotated[list[int], Field(min_length=1)]
    """Numbers of images, rising."""
    block: list[float]
    exit: list[float] = Field(default_factory=list)
    decision: list[float] = Field(default_factory=list)
    ask: list[float] = Field(default_factory=list)
    """Writing the answers and finding out who stays, by the number of images that were in."""
    pick: list[float] = Field(default_factory=list)
    """On top of that if somebody leaves: picking out those who stay, by their number."""
    drop: float = 0.0
    """On top of ``ask`` if nobody stays."""

    @model_validator(mode="after")
    def _fits(self) -> ExitTimes:
        if self.sizes != sorted(set(self.sizes)) or self.sizes[0] < 1:
            raise ValueError(f"sizes {self.sizes}: give numbers of images, rising, from 1")
        for name in ("block", "exit", "decision", "ask", "pick"):
            values = getattr(self, name)
            if len(values) not in ((len(self.sizes),) if name == "block" else (0, len(self.sizes))):
                raise ValueError(f"{name}: {len(values)} times for {len(self.sizes)} sizes")
        return self


class TimeModel(FrozenModel):
    """Milliseconds of every part of a run at several numbers of images, and what policies cost by them."""

    conditions: Conditions
    parts: Annotated[list[ExitTimes], Field(min_length=1)]
    """One per exit; blocks that run for whole batches only, as the first, have the batch's times at every size."""
    finish: float = 0.0
    """What follows the last decision of a batch."""
    steps: bool = False
    """Whether images are padded up to the next size; otherwise times are interpolated between sizes."""

    @model_validator(mode="after")
    def _fits(self) -> TimeModel:
        for i, part in enumerate(self.parts):
            if part.sizes[-1] < self.conditions.batch:
                raise ValueError(f"exit {i + 1}: measured up to {part.sizes[-1]} images of {self.conditions.batch}")
        return self

    def mean(self, shares: Sequence[float], asked: Asked | None = None) -> float:
        """Expected milliseconds of an image.

        Args:
            shares: (k,) of the images that leave at each exit, sum 1.
            asked: what is done behind each block, see `Asked.of_policy`; by default every exit is asked.
        """
        return self._batch(_still_in(shares), asked or Asked.everywhere(len(self.parts))) / self.conditions.batch

    @property
    def exits(self) -> list[float]:
        """Milliseconds of an image if all leave at exit 1, 2, ..., k, each before it being asked."""
        count = len(self.parts)
        return [self.mean(np.eye(count)[i].tolist()) for i in range(count)]

    def linearised(self, shares: Sequence[float], asked: Asked | None = None) -> list[float]:
        """Prices (k,) of an image that leaves at each exit, if few change from where these shares leave.

        The tangent of `mean`, so that the mean price at the shares is `mean` itself. Where another image makes a block
        dearer by ever less, it is never below `mean` at other shares. Positive and strictly rising.
        """
        here = np.asarray(shares, dtype=float) / np.sum(shares)
        cost = self.mean(here.tolist(), asked)
        moved = [(1 - _STEP) * here + _STEP * one for one in np.eye(len(here))]
        prices = [cost + (self.mean(there.tolist(), asked) - cost) / _STEP for there in moved]
        lowest = 0.0
        for i, price in enumerate(prices):
            prices[i] = lowest = max(price, lowest + _RISE * cost)
        factor = cost / float(np.dot(here, prices))
        return [factor * price for price in prices]

    def scaled(self, factor: float) -> TimeModel:
        """The same with every time multiplied."""

        def part(times: ExitTimes) -> ExitTimes:
            lists = {name: [factor * value for value in getattr(times, name)] for name in _LISTS}
            return times.model_copy(update={"drop": factor * times.drop, **lists})

        return self.model_copy(update={"parts": [*map(part, self.parts)], "finish": factor * self.finish})

    def resampled(self, sizes: Sequence[int]) -> TimeModel:
        """The same model told at other sizes, of which the last is the batch (or what it is padded to)."""

        def part(times: ExitTimes) -> ExitTimes:
            numbers = np.asarray(sizes)
            lists = {name: self._table(times, name, numbers).tolist() for name in _LISTS if getattr(times, name)}
            return ExitTimes.model_validate({"sizes": list(sizes), "drop": times.drop, **lists})

        return self.model_copy(update={"parts": [part(times) for times in self.parts]})

    def _table(self, times: ExitTimes, name: str, images: NDArray[np.int_]) -> Array:
        """Milliseconds of a part for numbers of images, 0 where the runtime has no such part."""
        values = getattr(times, name)
        if not values:
            return np.zeros(len(images))
        if self.steps:
            return np.asarray(values)[np.searchsorted(times.sizes, images)]
        return np.interp(images, times.sizes, values)

    def _batch(self, still_in: Array, asked: Asked) -> float:
        """Expected milliseconds of a batch; the shares (k + 1,) of the images that reach each block end with 0."""
        batch = self.conditions.batch
        images = np.arange(1, batch + 1)
        total = self.finish
        for i, times in enumerate(self.parts):
            names = ["block"]
            names += ["exit"] * asked.computed[i] + ["decision"] * asked.decides[i]
            names += ["ask"] * asked.fires[i]
            spent = np.sum([self._table(times, name, images) for name in names], axis=0)
            total += float(_binomial(batch, still_in[i], 1 - still_in[i])[1:] @ spent)
            if asked.fires[i] and i < len(self.parts) - 1:
                copies = np.array([times.drop, *self._table(times, "pick", images)])
                stay = still_in[i + 1]
                # so many stay, less the cases where they are all that were in
                left = _binomial(batch, stay, 1 - stay) - _binomial(batch, stay, 1 - still_in[i])
                total += float(left @ copies)
        return total


_LISTS = ("block", "exit", "decision", "ask", "pick")


def middle(models: Sequence[TimeModel]) -> TimeModel:
    """The mean of the middle half of the rounds, by their times: its sums are the sums' own means, unlike medians'.

    Args:
        models: one per round, of the same runner; their sizes may differ.
    """
    order = sorted(models, key=lambda model: sum(model.exits))
    cut = len(order) // 4
    kept = order[cut : len(order) - cut]
    sizes = kept[0].parts[-1].sizes if kept[0].steps else grid(kept[0].conditions.batch)
    kept = [model.resampled(sizes) for model in kept]
    mean = {
        "finish": float(np.mean([model.finish for model in kept])),
        "parts": [_mean([model.parts[i] for model in kept]) for i in range(len(kept[0].parts))],
    }
    return kept[0].model_copy(update=mean)


def _mean(parts: Sequence[ExitTimes]) -> ExitTimes:
    lists = {
        name: np.mean([getattr(part, name) for part in parts], axis=0).tolist()
        for name in _LISTS
        if getattr(parts[0], name)
    }
    drop = float(np.mean([part.drop for part in parts]))
    return ExitTimes.model_validate({"sizes": parts[0].sizes, "drop": drop, **lists})


def grid(batch: int) -> list[int]:
    """Numbers of images at which times are told: the powers of two below the batch, three quarters of it, and it."""
    powers = [2**i for i in range(batch.bit_length()) if 2**i < batch]
    return sorted({*powers, *([3 * batch // 4] if batch >= 8 else []), batch})


def _still_in(shares: Sequence[float]) -> Array:
    """Shares (k,) that leave at each exit -> shares (k + 1,) that reach each block, and behind the last one 0."""
    values = np.asarray(shares, dtype=float)
    if values.min() < 0 or values.sum() <= 0:
        raise ValueError(f"shares {list(shares)}: give the shares of images that leave at each exit, 0 or more")
    reaching = np.cumsum(values[::-1])[::-1] / values.sum()
    return np.clip(np.append(reaching, 0.0), 0.0, 1.0)


def _binomial(batch: int, stay: float, leave: float) -> Array:
    """C(B, n) stay^n leave^(B - n) for n = 0..B: (B + 1,)."""
    n = np.arange(batch + 1)
    factorials = np.cumsum(np.log(np.maximum(n, 1)))
    choose = factorials[-1] - factorials - factorials[::-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = [np.where(power == 0, 0.0, power * np.log(base)) for power, base in ((n, stay), (batch - n, leave))]
    return np.exp(choose + logs[0] + logs[1])
