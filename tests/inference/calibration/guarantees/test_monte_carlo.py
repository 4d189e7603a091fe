"""What intervals and promises say, over many draws of held-out images from stored logits: their own values are true.

A draw is with replacement from a population of which every logit is stored: `population/make.py` trained a network on
digits for one; the other are the reference numbers, where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from adaptive.errors import PolicyError
from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.calibration.guarantees.evidence import images_needed, images_needed_for_accuracy
from adaptive.inference.calibration.guarantees.exact_test import p_value
from adaptive.inference.calibration.guarantees.judged import images_of_the_test
from adaptive.inference.calibration.guarantees.risk import accuracy_sequence, candidates, fixed_sequence, front, losses
from adaptive.inference.calibration.search import cheapest
from adaptive.inference.calibration.thresholds import Scored, apply_thresholds
from adaptive.inference.intervals import lower_bound, mean_cost, paired_loss, wilson
from adaptive.inference.outputs import Outputs, simulate
from adaptive.inference.policy import NOBODY
from tests.networks.reference import FOLDER

STORED = Path(__file__).with_name("population") / "population.npz"
DRAWS = 2000


@dataclass(frozen=True)
class Population:
    """Logits (k, N, C), labels (N,), costs (k,) and what the exits answer."""

    logits: torch.Tensor
    labels: torch.Tensor
    costs: list[float]
    scored: Scored

    def drawn(self, images: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(len(self.labels), (images,), generator=generator)

    def top1(self, thresholds: list[float]) -> float:
        return apply_thresholds(torch.tensor(thresholds), self.scored, self.costs).top1

    def loss(self, thresholds: list[float]) -> float:
        return float(losses(thresholds, self.scored, self.costs).mean())


@cache
def population(name: str) -> Population:
    if name == "digits":
        found = np.load(STORED)
        logits, labels = torch.from_numpy(found["logits"]).float(), torch.from_numpy(found["labels"]).long()
        costs = found["costs"].tolist()
    else:
        found = np.load(FOLDER / "calibration_input.npz")
        chances = np.concatenate([found["val_pred"], found["test_pred"]], axis=1)
        logits = torch.from_numpy(chances).clamp(min=1e-12).log()
        labels = torch.from_numpy(np.concatenate([found["val_target"], found["test_target"]]))
        costs = found["flops"].tolist()
    return Population(logits, labels, costs, Scored.of(logits.softmax(-1), labels))


missing = pytest.mark.skipif(
    not (FOLDER / "calibration_input.npz").is_file(),
    reason=f"no {FOLDER}/calibration_input.npz: set ADAPTIVE_REFERENCE to the folder of the reference numbers",
)
POPULATIONS = ["digits", pytest.param("reference", marks=missing)]


def at_most(failures: int, draws: int, probability: float) -> bool:
    """Whether so many failures are compatible with this probability, at the level 0.001."""
    return bool(binom.sf(failures - 1, draws, probability) > 0.001)


def coverage(drawn: np.ndarray, interval: Callable[..., tuple[float, float]], truth: float) -> float:
    """Share of the draws, rows of numbers, whose interval holds the truth; equal rows are computed once."""
    rows, counts = np.unique(drawn, axis=0, return_counts=True)
    ranges = np.array([interval(*row.tolist()) for row in rows])
    held = (ranges[:, 0] <= truth + 1e-9) & (truth - 1e-9 <= ranges[:, 1])
    return float(counts[held].sum() / counts.sum())


@pytest.mark.parametrize(
    ("name", "images", "chosen"),
    [
        ("digits", 500, [8]),
        pytest.param("digits", 500, [4, 16, 28], marks=pytest.mark.full),
        pytest.param("digits", 2000, [12], marks=pytest.mark.full),
        pytest.param("reference", 500, [8, 28], marks=[missing, pytest.mark.full]),
    ],
)
def test_intervals_cover_what_they_say(name: str, images: int, chosen: list[int]) -> None:
    source, generator = population(name), np.random.default_rng(images)
    curve = candidates(source.scored.subset(torch.arange(1000)), source.costs)
    for choice in (curve[i] for i in chosen):
        there = apply_thresholds(torch.tensor(choice.thresholds), source.scored, source.costs)
        loss = losses(choice.thresholds, source.scored, source.costs)
        right = generator.binomial(images, there.top1 / 100, size=(DRAWS, 1))
        assert 0.93 <= coverage(right, lambda n: wilson(n, images), there.top1) <= 0.97
        lost, won = float((loss > 0).double().mean()), float((loss < 0).double().mean())
        apart = generator.multinomial(images, [lost, won, 1 - lost - won], size=DRAWS)[:, :2]
        cover = coverage(apart, lambda a, b: paired_loss(a, b, images), 100 * (lost - won))
        # Where hardly an image of a draw is lost or won, there are too few results for any interval to cover just 95 %.
        differ = images * (lost + won)
        assert 0.93 <= cover <= (0.97 if differ >= 4 else 0.975 if differ >= 3 else 1), (lost, won)
        counts = generator.multinomial(images, np.array(there.counts) / sum(there.counts), size=DRAWS)
        assert 0.93 <= coverage(counts, lambda *row: mean_cost(row, source.costs), there.cost) <= 0.97


@pytest.mark.full
@pytest.mark.parametrize("name", POPULATIONS)
def test_the_bound_of_an_accuracy_target_holds(name: str) -> None:
    source, generator = population(name), torch.Generator().manual_seed(1)
    target = source.top1([NOBODY] * (len(source.costs) - 1) + [-NOBODY]) - 2.5
    failures = missed = draws = 0
    for _ in range(6):
        try:
            thresholds = cheapest(source.scored.subset(source.drawn(250, generator)), source.costs, target).thresholds
        except PolicyError:  # not even the images that choose reach it
            continue
        truth = source.top1(thresholds)
        missed += truth < target
        for _ in range(DRAWS // 6):
            tested = source.scored.subset(source.drawn(250, generator))
            right = round(apply_thresholds(torch.tensor(thresholds), tested, source.costs).top1 * 2.5)
            failures += truth < lower_bound(right, 250)
            draws += 1
    assert missed >= 3  # the accuracy that was asked for is no bound
    assert draws >= DRAWS // 2
    assert at_most(failures, draws, 0.05)


@pytest.mark.full
@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("name", POPULATIONS)
def test_an_accuracy_is_kept_with_its_confidence(name: str, confidence: float) -> None:
    source, generator = population(name), torch.Generator().manual_seed(2)
    full = source.top1([NOBODY] * (len(source.costs) - 1) + [-NOBODY])
    target, failures, early, draws = full - 2, 0, 0, 0
    needed = images_needed_for_accuracy(target, confidence, full)
    assert needed is not None
    for _ in range(3):
        curve = front(source.scored.subset(source.drawn(needed, generator)), source.costs)
        for _ in range(100):
            tested = source.scored.subset(source.drawn(needed, generator))
            found = accuracy_sequence(curve, tested, source.costs, target, confidence)
            failures += bool(found.passed) and source.top1(found.thresholds) < target
            early += found.outcome.counts[-1] < needed
            draws += 1
    assert at_most(failures, draws, 1 - confidence)
    assert early > draws / 2


@pytest.mark.full
@pytest.mark.parametrize(("epsilon", "delta"), [(0.02, 0.1), (0.01, 0.1), (0.01, 0.3)])
@pytest.mark.parametrize("name", POPULATIONS)
def test_a_loss_is_exceeded_as_rarely_as_promised(name: str, epsilon: float, delta: float) -> None:
    source, generator = population(name), np.random.default_rng(3)
    needed, people = images_needed(epsilon, delta), len(source.labels)
    assert needed is not None
    failures = early = draws = 0
    for _ in range(3):
        family = torch.from_numpy(generator.integers(people, size=needed))
        curve = candidates(source.scored.subset(family), source.costs)
        curve.sort(key=lambda choice: -choice.outcome.cost)
        each = np.stack([losses(choice.thresholds, source.scored, source.costs).numpy() for choice in curve])
        truth = each.mean(1)
        for n in range(DRAWS // 3):
            drawn = generator.integers(
                people, size=needed
            )  # twice the stated number of images, half of them for the test
            lost, won = (each[:, drawn] > 0).sum(1).tolist(), (each[:, drawn] < 0).sum(1).tolist()
            passed = 0
            while passed < len(curve) and p_value(lost[passed], won[passed], needed, epsilon) <= delta:
                passed += 1
            failures += passed > 0 and truth[passed - 1] > epsilon
            early += passed > 0
            draws += 1
            if n % 200 == 0:  # the sequence above is that of the package
                tested = source.scored.subset(torch.from_numpy(drawn))
                assert fixed_sequence(curve, tested, source.costs, epsilon, delta).passed == passed
    assert at_most(failures, draws, delta)
    assert early > 0.8 * draws


@pytest.mark.parametrize(
    ("images", "target"),
    [
        pytest.param(500, Target(top1=95.0), marks=pytest.mark.full),
        pytest.param(1000, Target(top1=95.0, confidence=0.9), marks=pytest.mark.full),
        (500, Target(epsilon=0.01)),
    ],
    ids=str,
)
def test_whole_procedure(images: int, target: Target) -> None:
    """From logits to a policy: what the record says is what the images of the test say."""
    source = population("digits")
    drawn = source.drawn(images, torch.Generator().manual_seed(4))
    policy = fit(source.logits[:, drawn], source.labels[drawn], source.costs, target, temperature=True)
    record: Any = policy.calibration
    tested = drawn[images_of_the_test(images, 0)]
    outputs = Outputs(source.logits[:, tested], source.labels[tested], tested)
    found = simulate(policy, outputs.probabilities(policy))
    assert found.counts(4) == record.counts
    assert record.images == record.evidence.images == images // 2
    whole = Outputs(source.logits, source.labels, source.labels)
    truth = simulate(policy, whole.probabilities(policy)).top1(source.labels)
    if target.top1:
        assert record.bound <= truth
    else:
        assert record.counts[-1] < 250  # 500 held-out images are enough for one point
        assert record.evidence.shown
        full = 100 * source.scored.correct[-1].double().mean().item()
        assert full - truth <= 1
