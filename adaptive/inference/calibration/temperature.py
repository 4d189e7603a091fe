"""Temperature scaling: confidences that mean what they say (Guo et al., ICML 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

LOWEST, HIGHEST = 0.05, 20.0  # separable images would drive a temperature to 0, hopeless ones to infinity
_PRECISION = 1e-7
_ROWS = 512  # images at a time: their numbers stay in a core's cache


def fit_temperatures(logits: Iterable[Tensor], labels: Tensor) -> list[float]:
    """Return one temperature per exit that minimises the mean negative log-likelihood of softmax(logits / T).

    The likelihood is convex in 1 / T, so there is one minimum, which Newton's method, kept inside a bracket, finds to
    1e-7 of log T, in float64, between 0.05 and 20.

    Args:
        logits: k x (N, C) of held-out images.
        labels: (N,).
    """
    return [_fit(values, labels) for values in logits]


def _fit(logits: Tensor, labels: Tensor) -> float:
    low, high, exponent = math.log(LOWEST), math.log(HIGHEST), 0.0  # of log T
    while high - low > _PRECISION:
        inverse = math.exp(-exponent)
        slope, curvature = _derivatives(logits, labels, inverse)
        low, high = (exponent, high) if slope > 0 else (low, exponent)
        nearer = inverse - slope / curvature if curvature > 0 else 0.0
        following = -math.log(nearer) if nearer > 0 else high
        if not low < following < high:
            following = (low + high) / 2
        if abs(following - exponent) < _PRECISION:
            return math.exp(following)
        exponent = following
    return math.exp((low + high) / 2)


def _derivatives(logits: Tensor, labels: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the mean negative log-likelihood with respect to 1 / T, at ``inverse``.

    They are the mean over the images of E[z] - z_label and of Var[z] under softmax(z / T).
    """
    slope = curvature = 0.0
    for part, truth in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        values = part.double()
        chances = (values * inverse).softmax(dim=1)
        mean = (chances * values).sum(dim=1, keepdim=True)
        curvature += float((chances * (values - mean).square_()).sum())
        slope += float((mean - values.gather(1, truth.unsqueeze(1))).sum())
    return slope / len(labels), curvature / len(labels)
