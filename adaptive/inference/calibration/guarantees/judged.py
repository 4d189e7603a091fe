"""Thresholds with what images that chose nothing say about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive.inference.calibration.guarantees import evidence
from adaptive.inference.calibration.guarantees.risk import Tested, control, control_accuracy
from adaptive.inference.calibration.search import cheapest
from adaptive.inference.calibration.thresholds import Choice, Scored, apply_thresholds
from adaptive.inference.intervals import LEVEL, lower_bound
from adaptive.inference.policy import Evidence


def images_of_the_test(images: int, seed: int) -> Tensor:
    """Return the numbers of the held-out images that test a policy for an accuracy or a bounded loss, half of them."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    return order[images // 2 :].sort().values


@dataclass(frozen=True)
class Judged:
    """Thresholds, and where there was a test the evidence of it.

    Attributes:
        choice: the thresholds, with their outcome on the images of the test, or without one on those that chose them.
        bound: lower bound on the accuracy in truth, in percent.
        confidence: of the bound.
        evidence: whether the target is shown.
    """

    choice: Choice
    bound: float | None = None
    confidence: float | None = None
    evidence: Evidence | None = None

    @classmethod
    def by_loss(cls, family: Scored, tested: Scored, costs: Sequence[float], epsilon: float, delta: float) -> Judged:
        """The cheapest thresholds of which a test shows that they lose at most epsilon; `control` has the arguments."""
        found = control(family, tested, costs, epsilon, delta)
        return cls(found, evidence=evidence.of_loss(found, tested, epsilon, delta))

    @classmethod
    def by_accuracy(
        cls, family: Scored, tested: Scored, costs: Sequence[float], top1: float, confidence: float | None
    ) -> Judged:
        """The cheapest thresholds that have an accuracy, in percent, on ``family``, or in truth with a confidence.

        Without a confidence the bound is that of the images of the test, at 95 %, which had no part in the choice: it
        needs no correction. With one it is the accuracy asked for: what these images say of the last thresholds that
        passed is too good, but whether the sequence of tests was right to pass them is covered. Where none passed it
        is the full network's.
        """
        if confidence is None:
            thresholds = cheapest(family, costs, top1).thresholds
            choice: Choice = Choice(thresholds, apply_thresholds(torch.tensor(thresholds), tested, costs))
        else:
            choice = control_accuracy(family, tested, costs, top1, confidence)
        level = LEVEL if confidence is None else confidence
        images = len(choice.outcome.leaves)
        bound = lower_bound(round(choice.outcome.top1 * images / 100), images, level)
        if isinstance(choice, Tested):
            bound = top1 if choice.passed else min(bound, top1)
        return cls(choice, bound, level, evidence.of_accuracy(choice, tested, top1, level, bound))
