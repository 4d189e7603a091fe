"""Thresholds for a budget in milliseconds, where what an image costs depends on how many others are still in.

The search for thresholds wants a price per exit. The model of time gives the tangent's prices at some shares; a search
with these finds other shares, where the next prices are taken, until nothing changes. Where another image makes a block
dearer by ever less, a tangent is never too cheap, so that this goes up in accuracy within the budget. In the end it is
the model that says whether the budget is kept, never a price.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from adaptive.errors import PolicyError
from adaptive.inference.calibration.thresholds import SLACK, Choice, Scored, apply_thresholds
from adaptive.inference.measuring.time_model import Asked, TimeModel
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy

Choose = Callable[[list[float], float], Choice]
"""From the prices of the exits and a mean cost to thresholds."""

_ITERATIONS = 6
_BISECTIONS = 5


class Timed(NamedTuple):
    """Thresholds, what they cost by the model, in ms per image, and the prices of the exits at their shares."""

    choice: Choice
    milliseconds: float
    prices: list[float]


class Clockwork:
    """What policies of one kind cost by a model of time.

    Args:
        model: of the network's runner.
        template: a policy of the kind; its thresholds do not count.
        collaboration: whether an exit takes the answer of the one before.
    """

    def __init__(self, model: TimeModel, template: Policy, collaboration: bool) -> None:
        self.model = model
        self._template, self._collaboration = template, collaboration
        exits = len(model.parts)
        never = [NOBODY] * (exits - 1)
        self.ends = ([EVERYBODY, *never[1:], EVERYBODY] if never else [EVERYBODY], [*never, EVERYBODY])

    def asked(self, thresholds: list[float]) -> Asked:
        """What the runner does for thresholds."""
        return Asked.of_policy(self._template.with_thresholds(thresholds), self._collaboration)

    def cost(self, thresholds: list[float], shares: list[float]) -> float:
        """Milliseconds of an image."""
        return self.model.mean(shares, self.asked(thresholds))

    def range(self) -> tuple[float, float]:
        """Milliseconds of an image if all leave at exit 1, and if nobody leaves before the last."""
        exits = len(self.model.parts)
        low, high = (self.cost(self.ends[i], np.eye(exits)[i * (exits - 1)].tolist()) for i in (0, 1))
        return low, max(low, high)


def check_milliseconds(budget: float, clockwork: Clockwork, name: str = "budget") -> None:
    """Refuse a budget, by its name, that no policy keeps, or every one (PolicyError)."""
    low, high = clockwork.range()
    if not low * (1 - SLACK) <= budget <= high * (1 + SLACK):
        conditions = clockwork.model.conditions
        raise PolicyError(
            f"{name} {budget:.4g} ms: an image takes from {low:.4g} ms (all leave at exit 1) to {high:.4g} ms (nobody "
            f"leaves before exit {len(clockwork.model.parts)}) here ({conditions.words()}); give a budget in this range"
        )


def within(scored: Scored, choose: Choose, clockwork: Clockwork, budget: float) -> Timed:
    """Choose thresholds whose milliseconds by the model are within the budget.

    Args:
        scored: the answers of k exits to held-out images.
        choose: the search on these images, for prices and a mean cost in their range.
        clockwork: what policies cost.
        budget: mean milliseconds of an image.

    Raises:
        PolicyError: the budget is out of range.
    """
    check_milliseconds(budget, clockwork)
    exits = len(clockwork.model.parts)
    tried = [_timed(thresholds, scored, clockwork) for thresholds in clockwork.ends]
    shares = [1 / exits] * exits
    for _ in range(_ITERATIONS):
        prices = clockwork.model.linearised(shares)
        choice = choose(prices, min(max(budget, prices[0]), prices[-1]))
        known = any(choice.thresholds == other.choice.thresholds for other in tried)
        tried.append(_timed(choice.thresholds, scored, clockwork))
        if known:
            break
        shares = _shares(choice)
    low, high = prices[0], prices[-1]
    middle = min(max(budget, low), high)
    for _ in range(_BISECTIONS):  # exits that are not asked in the end leave some of a budget in prices over
        tried.append(_timed(choose(prices, middle).thresholds, scored, clockwork))
        low, high = (middle, high) if tried[-1].milliseconds <= budget else (low, middle)
        middle = (low + high) / 2
    kept = [timed for timed in tried if timed.milliseconds <= budget * (1 + SLACK)]
    return max(kept, key=lambda timed: (timed.choice.outcome.top1, -timed.milliseconds))


def _timed(thresholds: list[float], scored: Scored, clockwork: Clockwork) -> Timed:
    """Thresholds with their outcome, priced where it lies."""
    values = torch.tensor(thresholds)
    shares = _shares(Choice(thresholds, apply_thresholds(values, scored, [0.0] * len(thresholds))))
    prices = clockwork.model.linearised(shares, clockwork.asked(thresholds))
    cost = clockwork.cost(thresholds, shares)
    return Timed(Choice(thresholds, apply_thresholds(values, scored, prices)), cost, prices)


def _shares(choice: Choice) -> list[float]:
    total = sum(choice.outcome.counts)
    return [count / total for count in choice.outcome.counts]
