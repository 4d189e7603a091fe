from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from adaptive.inference.calibration.guarantees.exact_test import accuracy_p_value, p_value
from adaptive.inference.paired_score import score


def _probability(images: int, epsilon: float, won: float, observed: tuple[int, int]) -> float:
    """Of results at least as extreme as the observed, by walking through all of them."""
    limit, total = score(*observed, images, epsilon), 0.0
    for a in range(images + 1):
        for b in range(images + 1 - a):
            if score(a, b, images, epsilon) <= limit + 1e-9:
                total += binom.pmf(a + b, images, 2 * won + epsilon) * binom.pmf(
                    a, a + b, (won + epsilon) / (2 * won + epsilon)
                )
    return total


@pytest.mark.parametrize(("images", "epsilon", "observed"), [(15, 0.1, (0, 0)), (18, 0.2, (2, 3))])
def test_p_value_is_the_highest_probability_of_all_distributions(
    images: int, epsilon: float, observed: tuple[int, int]
) -> None:
    found = p_value(*observed, images, epsilon)
    walked = max(_probability(images, epsilon, won, observed) for won in np.linspace(0, (1 - epsilon) / 2, 20))
    assert found <= walked + 2e-5 + 1e-3  # no more than all of them
    assert found >= walked - 1e-2  # which the interval of the nuisance share leaves out at most


@pytest.mark.parametrize(("images", "epsilon"), [(40, 0.1), (60, 0.05)])
def test_what_is_more_extreme_stays_so(images: int, epsilon: float) -> None:
    """The condition under which the supremum lies where the loss is epsilon: fewer lost or more won is more extreme."""
    table = np.array([[score(a, b, images, epsilon) for b in range(images // 2)] for a in range(images // 2)])
    assert (np.diff(table, axis=0) > 0).all()
    assert (np.diff(table, axis=1) < 0).all()


@pytest.mark.parametrize("epsilon", [0.005, 0.01, 0.02, 0.05])
def test_nothing_lost_takes_as_many_images_as_any_test(epsilon: float) -> None:
    least = int(np.ceil(np.log(0.1) / np.log1p(-epsilon)))
    assert p_value(0, 0, least, epsilon) == pytest.approx((1 - epsilon) ** least, abs=2e-5)
    assert p_value(0, 0, least, epsilon) <= 0.1 < p_value(0, 0, least - 1, epsilon)


@pytest.mark.parametrize(("images", "won"), [(50, 0.0), (200, 0.02), (100, 0.4)])
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_p_value_is_valid_where_the_hypothesis_just_holds(images: int, won: float, delta: float) -> None:
    generator, epsilon, draws = np.random.default_rng(images), 0.05, 1000
    found = generator.multinomial(images, [won + epsilon, won, 1 - 2 * won - epsilon], size=draws)
    rejected = sum(p_value(int(a), int(b), images, epsilon) <= delta for a, b, _ in found)
    assert binom.sf(rejected - 1, draws, delta) > 0.001


def test_p_value_has_power_where_losses_are_rare() -> None:
    found = np.random.default_rng(0).multinomial(1000, [0.01, 0.005, 0.985], size=200)
    assert np.mean([p_value(int(a), int(b), 1000, 0.02) <= 0.1 for a, b, _ in found]) > 0.95


def test_extremes() -> None:
    assert p_value(30, 0, 30, 0.1) == 1
    assert p_value(0, 30, 30, 0.1) < 2e-5
    assert p_value(0, 0, 1, 0.5) == pytest.approx(0.5, abs=1e-4)
    assert p_value(0, 0, 100_000, 0.01) == pytest.approx(1e-5)


def test_accuracy_is_the_binomial_test() -> None:
    assert accuracy_p_value(500, 500, 0.99) == pytest.approx(0.99**500)
    assert accuracy_p_value(0, 10, 0.5) == 1
