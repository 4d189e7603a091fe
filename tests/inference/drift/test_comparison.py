"""The test of drift: the statistic is scipy's, alike images raise the stated share of alarms, others are noticed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom, chi2_contingency

from adaptive.errors import PolicyError
from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.drift.comparison import compare, detectable, homogeneity, merged
from adaptive.inference.drift.counts import EDGES, Counts
from adaptive.inference.outputs import ExitProbabilities, simulate
from adaptive.inference.policy import Policy
from tests.inference.answers import made_up_logits

EXITS, BINS = 3, len(EDGES) + 1


def shares(seed: int = 0, exits: int = EXITS) -> np.ndarray:
    """Probabilities of all cells, of which many are rare."""
    return np.random.default_rng(seed).dirichlet(np.full(exits * BINS, 0.3))


def drawn(generator: np.random.Generator, images: int, cells: np.ndarray) -> Counts:
    return Counts(cells=generator.multinomial(images, cells).reshape(-1, BINS).tolist())


def alarms(then: int, now: int, level: float, draws: int, change: float = 0.0) -> int:
    """How many of so many draws are called drifted, where a share of the images comes from elsewhere."""
    generator, cells = np.random.default_rng(1), shares()
    other = (1 - change) * cells + change * shares(5)
    pairs = ((drawn(generator, then, cells), drawn(generator, now, other)) for _ in range(draws))
    return sum(compare(*pair, level).verdict == "drifted" for pair in pairs)


def test_the_statistic_is_pearsons() -> None:
    pairs = [(40, 70), (25, 30), (35, 20), (9, 31)]
    assert homogeneity(pairs) == pytest.approx(chi2_contingency(np.array(pairs), correction=False).statistic)


def test_cells_are_merged_by_sums_alone() -> None:
    generator = np.random.default_rng(2)
    for _ in range(50):
        then, now = (generator.multinomial(400, shares()).reshape(EXITS, BINS) for _ in range(2))
        pairs = merged(then.tolist(), now.tolist())
        assert np.sum(pairs, axis=0).tolist() == [400, 400]
        assert min(map(sum, pairs)) >= 2 * 20
        swapped = merged(now.tolist(), then.tolist())
        assert pairs == [(a, b) for b, a in swapped]
    assert merged([[0, 3], [0, 0]], [[0, 1], [0, 0]]) == [(3, 1)]
    assert merged([[0, 0]], [[4, 5]]) == [(0, 9)]


@pytest.mark.parametrize(("then", "now"), [(500, 500), (300, 6000), (6000, 300)])
def test_alike_images_raise_no_more_alarms_than_stated(then: int, now: int) -> None:
    for level in (0.05, 0.01):
        assert alarms(then, now, level, 400) <= binom.isf(1e-3, 400, level)


def test_other_images_raise_the_alarm() -> None:
    assert alarms(500, 1000, 0.01, 50, change=0.3) >= 48
    assert alarms(500, 1000, 0.01, 50, change=0.1) >= 10


def test_verdicts() -> None:
    generator = np.random.default_rng(3)
    then = drawn(generator, 500, shares())
    alike = compare(then, then, 0.01)
    assert (alike.verdict, alike.p_value, alike.enough) == ("alike", 1.0, None)
    assert alike.visible is not None
    assert 0.05 < alike.visible < 0.25
    few = compare(then, drawn(generator, 20, shares()), 0.01)
    assert few.verdict == "too few"
    assert few.enough is not None
    assert compare(then, drawn(generator, few.enough + 20, shares()), 0.01).verdict == "alike"
    none = compare(then, Counts.none(EXITS), 0.01)
    assert (none.verdict, none.p_value) == ("too few", 1.0)
    small = compare(drawn(generator, 50, shares()), drawn(generator, 9000, shares()), 0.01)
    assert (small.verdict, small.enough) == ("too few", None)
    with pytest.raises(PolicyError, match="false alarms 1: give a probability"):
        compare(then, then, 1.0)


def test_the_change_that_shows_does_so_nine_times_in_ten() -> None:
    images, cells = 800, 8
    share = detectable(images, images, cells, 0.01)
    assert share is not None
    generator = np.random.default_rng(4)
    halves = [np.repeat([1 + change, 1 - change], cells // 2) / cells for change in (2 * share, -2 * share)]
    middle = np.full(cells, 1 / cells)
    found = 0
    for i in range(400):
        a, b = generator.multinomial(images, middle), generator.multinomial(images, halves[i % 2])
        found += chi2_contingency(np.array([a, b])).pvalue <= 0.01
    assert 0.85 < found / 400 < 0.95


def seen_by(policy: Policy, logits: torch.Tensor) -> Counts:
    found = simulate(policy, ExitProbabilities(logits, policy))
    return Counts.of(found.exits, found.confidences, policy.exits)


def calibrated(seed: int, images: int, target: Target, kind: str = "confidence", method: str = "search") -> Policy:
    logits, labels, costs = made_up_logits(EXITS, images, seed=seed)
    return fit(logits, labels, costs, target, kind=kind, method=method, temperature=True, seed=seed)


def test_a_calibration_remembers_its_images() -> None:
    for target in (Target(budget=1.8), Target(epsilon=0.2)):
        logits, labels, costs = made_up_logits(EXITS, 400)
        policy = fit(logits, labels, costs, target)
        assert policy.calibration
        assert policy.calibration.seen == seen_by(policy, logits)
        assert policy.calibration.seen.images == 400
    older = policy.model_dump()
    del older["calibration"]["seen"], older["calibration"]["dataset"]
    assert Policy.model_validate(older).calibration
    with pytest.raises(ValueError, match=r"calibration\.seen counts 1 exits of 3"):
        Policy.model_validate({**older, "calibration": {**older["calibration"], "seen": Counts.none(1)}})


def test_images_that_are_harder_or_blurred_are_noticed() -> None:
    policy = calibrated(0, 500, Target(budget=1.8))
    assert policy.calibration
    assert policy.calibration.seen
    fresh, _, _ = made_up_logits(EXITS, 1000, seed=99)
    assert compare(policy.calibration.seen, seen_by(policy, fresh), 0.01).verdict == "alike"
    for other in (0.7 * fresh, fresh + torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))):
        assert compare(policy.calibration.seen, seen_by(policy, other), 0.01).verdict == "drifted"


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("target", "kind", "method", "draws"),
    [
        (Target(budget=1.8), "confidence", "search", 60),
        (Target(budget=1.8), "margin", "maximum", 40),
        (Target(top1=70.0), "confidence", "search", 40),
        (Target(epsilon=0.05), "confidence", "search", 40),
        (Target(budget=1.8), "gate", "search", 20),
    ],
    ids=lambda value: str(value),
)
def test_thresholds_chosen_on_the_reference_raise_no_more_alarms(
    target: Target, kind: str, method: str, draws: int
) -> None:
    """The images that thresholds, temperatures and gates were fitted on are the reference, and not a little better."""
    each, level, raised = 5, 0.05, 0
    for seed in range(draws):
        policy = calibrated(seed, 500, target, kind, method)
        assert policy.calibration
        assert policy.calibration.seen
        for further in range(each):
            fresh, _, _ = made_up_logits(EXITS, 800, seed=10_000 + each * seed + further)
            raised += compare(policy.calibration.seen, seen_by(policy, fresh), level).verdict == "drifted"
    # Those that share a reference go together: as many independent draws as there are references, at the least.
    assert raised / each <= binom.isf(1e-3, draws, level)
