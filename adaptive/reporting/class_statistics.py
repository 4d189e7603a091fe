"""Statistics by class: which classes leave at which exit, and which are confused there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adaptive.reporting.report_data import RunReport


def class_shares(run: RunReport) -> NDArray[np.float64]:
    """Share (C, k) of each class's images that leave at each exit; NaN rows for classes without images."""
    assert run.exits is not None, "the run has no policy"
    k = len(run.macs)
    counts = np.bincount(run.labels * k + run.exits - 1, minlength=len(run.classes) * k).reshape(-1, k)
    totals = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)


def confusion(run: RunReport, number: int) -> NDArray[np.int64]:
    """Confusion matrix (C, C) of the images that leave at an exit: true class in rows, answer in columns."""
    here = run.left_at(number)
    classes = len(run.classes)
    flat = np.bincount(run.labels[here] * classes + run.given[here], minlength=classes * classes)
    return flat.reshape(classes, classes)


def confused_pairs(run: RunReport, number: int, most: int = 10) -> list[tuple[str, str, int]]:
    """The most frequent mistakes at an exit, of the images that leave there: (true class, answer, images)."""
    here = run.left_at(number)
    here = here[~run.right[here]]
    pairs, counts = np.unique(np.stack([run.labels[here], run.given[here]], axis=1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(run.classes[pairs[i, 0]], run.classes[pairs[i, 1]], int(counts[i])) for i in order]
