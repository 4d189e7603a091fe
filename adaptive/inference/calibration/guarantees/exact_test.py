"""Exact tests on held-out images: of a loss of accuracy against the full network, and of an accuracy."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from adaptive.inference.paired_score import score

_BEYOND = 1e-5  # probability that the share of images on which the two differ lies outside of what is searched
_SHARES = 40  # tried for it: steps of a quarter of its standard error, over which no result becomes much likelier
_REACH = 7  # standard deviations of a binomial count, and as many images; beyond lies less than 1e-9


@lru_cache(maxsize=65536)
def p_value(lost: int, won: int, images: int, epsilon: float) -> float:
    """Return a p-value of "the expected loss of accuracy is epsilon or more", valid for any number of images.

    The exact unconditional test of non-inferiority for paired proportions (Hsueh, Liu and Chen, Biometrics 57, 2001,
    pages 478 to 483): results are ordered by the score statistic, and the p-value is the highest probability, over
    all distributions that lose epsilon, of one as extreme or more. Only the share of images on which the two
    classifiers differ is unknown; it is searched in an exact interval of its own, whose error of 1e-5 is added to the
    p-value (Berger and Boos, JASA 89, 1994, pages 1012 to 1016). With nothing lost or won it is (1 - epsilon)^N, which
    no valid test of N images goes below. Nothing is assumed but independent images.

    Args:
        lost: images that only the full network has right.
        won: images that only the early answer has right.
        images: N.
        epsilon: a share above 0, below 1.
    """
    from scipy.stats import beta, binom

    apart = lost + won
    low = float(beta.ppf(_BEYOND / 2, apart, images - apart + 1)) if apart else 0.0
    high = float(beta.ppf(1 - _BEYOND / 2, apart + 1, images - apart)) if apart < images else 1.0
    if high <= epsilon:
        return _BEYOND  # the loss cannot exceed the share on which they differ
    shares = np.linspace(max(low, epsilon), high, _SHARES)[:, None]
    reach = [_REACH * (math.sqrt(images * share) + 1) for share in (shares[0, 0], high)]
    counts = np.arange(
        max(0, math.floor(images * shares[0, 0] - reach[0])), min(images, math.ceil(images * high + reach[1])) + 1
    )
    most = _most_lost(counts, float(score(lost, won, images, epsilon)), images, epsilon)
    chances = binom.pmf(counts, images, shares) * binom.cdf(most, counts, (1 + epsilon / shares) / 2)
    return min(1.0, float(chances.sum(axis=1).max()) + _BEYOND)


def _most_lost(counts: np.ndarray, observed: float, images: int, epsilon: float) -> np.ndarray:
    """Return the highest number lost, for each number of images apart, that is as extreme as the observed; -1: none."""
    low, high = np.full(len(counts), -1), counts.copy()
    while (low < high).any():
        middle = -((-low - high) // 2)
        extreme = score(middle, counts - middle, images, epsilon) <= observed + 1e-9
        low, high = np.where(extreme, middle, low), np.where(extreme, high, middle - 1)
    return low


def accuracy_p_value(right: int, images: int, accuracy: float) -> float:
    """Return the exact p-value of "the accuracy is below ``accuracy``" (a share): the binomial test, one-sided."""
    from scipy.stats import binom

    return float(binom.sf(right - 1, images, accuracy))
