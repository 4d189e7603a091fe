"""Smoothed correctness for the threshold search: how probably an exit is right, given how sure all exits are."""

from __future__ import annotations

import numpy as np

from adaptive.inference.calibration.thresholds import Scored

_RIDGE = 1.0
_STEPS = 12


def expected_correctness(scored: Scored) -> np.ndarray:
    """Return the probability (k, N) that each exit is right, from one logistic regression per exit.

    Inputs are the normal scores of all exits' ranks, their squares and their products. What chance did to the images
    at hand averages out in the fit, while the expected accuracy of any set of images that scores alone select, which
    is what thresholds do, stays what it is as far as the regression holds.

    Args:
        scored: the answers of k exits to N images.
    """
    inputs = _inputs(scored.scores.numpy())
    return np.stack([_regress(inputs, right) for right in scored.correct.numpy().astype(np.float64)])


def _inputs(scores: np.ndarray) -> np.ndarray:
    """Scores (k, N) -> (N, 1 + k + k (k + 1) / 2), the scores' scale taken out."""
    images = scores.shape[1]
    columns = [np.ones(images)]
    for row in scores:
        _, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
        share = ((counts.cumsum() - 0.5 * counts) / images)[inverse]
        columns.append(np.log(share / (1 - share)) / 1.8)  # nearly a normal score, without the normal quantile
    first = columns[1:]
    products = [a * b for i, a in enumerate(first) for b in first[i:]]
    return np.stack([*columns, *products], axis=1)


def _regress(inputs: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Fit a logistic regression with a small ridge by Newton steps; return its probabilities (N,)."""
    weights, ridge = np.zeros(inputs.shape[1]), _RIDGE * np.eye(inputs.shape[1])
    for _ in range(_STEPS):
        found = _logistic(inputs @ weights)
        gradient = inputs.T @ (found - right) + _RIDGE * weights
        curvature = (inputs * (found * (1 - found))[:, None]).T @ inputs + ridge
        weights = weights - np.linalg.solve(curvature, gradient)
    return _logistic(inputs @ weights)


def _logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -30, 30)))
