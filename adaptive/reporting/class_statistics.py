"""Statistics by class: which classes leave at which exit, and which are confused there; and calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adaptive.reporting.run_report import RunReport

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: per bin of confidence that holds images, their mean confidence, accuracy and share.

    ``ece`` is the expected calibration error in percent, arXiv 1706.04599: the mean distance of the two, by share.
    """

    confidence: list[float]
    accuracy: list[float]
    share: list[float]
    ece: float

    def points(self, least: float) -> tuple[list[float], list[float]]:
        """Confidences and accuracies of the bins that hold at least this share of the images."""
        kept = [i for i, share in enumerate(self.share) if share >= least]
        return [self.confidence[i] for i in kept], [self.accuracy[i] for i in kept]


def reliability(confidences: NDArray[np.floating], right: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Bin answers by confidence, (N,) in [0, 1] and whether each is right (N,), into bins of equal width.

    Bins are closed above, as in the paper; 0 belongs to the first.
    """
    places = np.clip(np.ceil(confidences.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(places, minlength=bins)
    full = counts > 0
    confidence = np.bincount(places, weights=confidences, minlength=bins)[full] / counts[full]
    accuracy = np.bincount(places, weights=right, minlength=bins)[full] / counts[full]
    share = counts[full] / len(right)
    ece = 100 * float(np.sum(share * np.abs(accuracy - confidence)))
    return Reliability(confidence.tolist(), accuracy.tolist(), share.tolist(), ece)


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
