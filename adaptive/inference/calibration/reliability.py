"""Reliability diagram and expected calibration error (ECE): does a confidence of 80 % mean 80 % right?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: per bin of confidence that holds images, their mean confidence, accuracy and share.

    ``ece`` is the expected calibration error in percent (Guo et al., ICML 2017, arXiv 1706.04599, equation 3): the
    mean distance of a bin's accuracy from its confidence, weighted by its share of the images.
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
    numbers = np.clip(np.ceil(confidences.astype(np.float64) * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(numbers, minlength=bins)
    full = counts > 0
    confidence = np.bincount(numbers, weights=confidences, minlength=bins)[full] / counts[full]
    accuracy = np.bincount(numbers, weights=right, minlength=bins)[full] / counts[full]
    share = counts[full] / len(right)
    ece = 100 * float(np.sum(share * np.abs(accuracy - confidence)))
    return Reliability(confidence.tolist(), accuracy.tolist(), share.tolist(), ece)
