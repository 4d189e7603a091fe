from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from adaptive.inference.intervals import lower_bound, mean_cost, paired_loss, wilson
from adaptive.inference.paired_score import score


def test_wilson_is_its_formula() -> None:
    share, images, z = 0.9, 500, 1.959964
    middle = (share + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
    assert wilson(450, 500) == pytest.approx((100 * (middle - half), 100 * (middle + half)))
    assert wilson(500, 500)[1] == 100
    assert wilson(500, 500)[0] < 99.3  # every image right is no certainty


def test_lower_bound_is_exact() -> None:
    bound = lower_bound(480, 500, 0.95) / 100
    assert binom.sf(479, 500, bound) == pytest.approx(0.05)
    assert lower_bound(500, 500, 0.9) == pytest.approx(100 * 0.1 ** (1 / 500))
    assert lower_bound(0, 500) == 0


def test_paired_loss_is_tango_s() -> None:
    low, high = paired_loss(1, 3, 44)
    assert low < -100 * 2 / 44 < high
    assert score(1, 3, 44, low / 100) == pytest.approx(1.959964, abs=1e-4)
    assert score(1, 3, 44, high / 100) == pytest.approx(-1.959964, abs=1e-4)
    # Under a difference of 0 the statistic is McNemar's.
    assert score(9, 3, 100, 0.0) == pytest.approx(6 / math.sqrt(12))
    assert paired_loss(3, 1, 44) == pytest.approx((-high, -low))
    assert paired_loss(0, 0, 500)[1] == pytest.approx(-paired_loss(0, 0, 500)[0])
    assert 0.5 < paired_loss(0, 0, 500)[1] < 0.8  # nothing lost on 500 images is no certainty
    assert paired_loss(9, 0, 9)[1] == 100
    assert paired_loss(0, 9, 9)[0] == -100


def test_level_widens() -> None:
    for narrow, wide in (
        (wilson(90, 100, 0.8), wilson(90, 100, 0.99)),
        (paired_loss(5, 2, 100, 0.8), paired_loss(5, 2, 100, 0.99)),
        (mean_cost([50, 50], [1, 2], 0.8), mean_cost([50, 50], [1, 2], 0.99)),
    ):
        assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_mean_cost_resamples_the_images() -> None:
    counts, costs = [300, 150, 50], [1.0, 2.5, 6.0]
    each = np.repeat(costs, counts)
    generator = np.random.default_rng(1)
    again = [generator.choice(each, len(each)).mean() for _ in range(4000)]
    assert mean_cost(counts, costs) == pytest.approx(np.quantile(again, [0.025, 0.975]), rel=5e-3)
    assert mean_cost(counts, costs) == mean_cost(counts, costs)
    assert mean_cost([0, 500], [1.0, 2.0]) == (2.0, 2.0)
