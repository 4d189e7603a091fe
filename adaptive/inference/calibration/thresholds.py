"""Thresholds on the exits' scores, and their outcome: an image leaves at the first exit whose threshold it reaches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.errors import PolicyError

SLACK = 1e-9  # relative: costs and budgets closer than this are the same


@dataclass(frozen=True)
class Scored:
    """Scores and correctness of k exits on N images.

    Attributes:
        scores: (k, N) float32, how sure each was.
        correct: (k, N) bool, whether it was right.
    """

    scores: Tensor
    correct: Tensor

    @classmethod
    def of(cls, probabilities: Tensor, labels: Tensor) -> Scored:
        """From softmax outputs (k, N, C) and labels (N,); the score is the highest probability."""
        confidence, answer = probabilities.max(dim=-1)
        return cls(confidence, answer == labels)

    def subset(self, images: Tensor) -> Scored:
        """Return the same for some images, given by their numbers (n,)."""
        return Scored(self.scores[:, images], self.correct[:, images])


@dataclass(frozen=True)
class Outcome:
    """Accuracy and cost of thresholds on a set of images, and where each image leaves.

    Attributes:
        leaves: (N,) int64, number of the exit, from 0, at which each image leaves.
        counts: how many leave at each exit.
        top1: accuracy in percent, each image counted where it leaves.
        cost: mean cost of an image, in the unit of the exits' costs.
    """

    leaves: Tensor
    counts: list[int]
    top1: float
    cost: float


@dataclass(frozen=True)
class Choice:
    """Thresholds, one per exit, and their outcome on the images they were chosen on."""

    thresholds: list[float]
    outcome: Outcome


def apply_thresholds(thresholds: Tensor, scored: Scored, costs: Sequence[float]) -> Outcome:
    """Let every image leave at the first exit whose threshold (k,) its score reaches.

    Args:
        thresholds: of any calibration; the last one has to let everybody leave.
        scored: the answers of the k exits to the images.
        costs: of one image up to each exit, for example MACs.
    """
    reached = scored.scores >= thresholds.to(scored.scores).unsqueeze(1)
    if not bool(reached[-1].all()):
        raise ValueError(f"the last threshold is {float(thresholds[-1])}: some images would never leave")
    leaves = torch.full((reached.shape[1],), len(reached) - 1)
    for i in reversed(range(len(reached) - 1)):  # argmax over so few rows takes ten times as long
        leaves.masked_fill_(reached[i], i)
    counts = leaves.bincount(minlength=len(costs)).tolist()
    right = scored.correct.gather(0, leaves.unsqueeze(0)).sum().item()
    total = sum(counts)
    cost = sum(count * float(price) for count, price in zip(counts, costs, strict=True)) / total
    return Outcome(leaves, counts, 100 * right / total, cost)


def check_costs(costs: Sequence[float], exits: int) -> None:
    """Refuse costs that are not one positive, strictly rising number per exit (PolicyError)."""
    if len(costs) != exits:
        raise PolicyError(f"costs: {len(costs)} for {exits} exits; give the cost of an image up to every exit")
    for i, cost in enumerate(costs):
        if not (math.isfinite(cost) and cost > (costs[i - 1] if i else 0)):
            shown = ", ".join(f"{c:g}" for c in costs)
            raise PolicyError(
                f"costs: {shown}: exit {i + 1}'s has to be a finite number above "
                f"{'the one before it' if i else '0'}; give the cumulative cost of an image up to every exit"
            )


def check_budget(budget: float, costs: Sequence[float], unit: str = "") -> None:
    """Refuse a mean cost below the first exit's or above the last one's (PolicyError)."""
    if not costs[0] * (1 - SLACK) <= budget <= costs[-1] * (1 + SLACK):
        name = f" {unit}" if unit else ""
        raise PolicyError(
            f"budget {budget:g}{name}: the mean cost of an image lies between {costs[0]:g} (all leave at exit 1) and "
            f"{costs[-1]:g}{name} (all reach exit {len(costs)}); give a budget in this range"
        )
