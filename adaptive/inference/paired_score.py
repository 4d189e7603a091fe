"""The score statistic of two paired proportions: how far a loss of accuracy on N images is from a supposed one."""

from __future__ import annotations

from typing import Any

import numpy as np


def score(lost: Any, won: Any, images: int, difference: float) -> Any:
    """Return (loss - difference) in standard errors under "the loss in truth is ``difference``".

    The variance is that of the likeliest proportions with this difference, not of the observed ones, which are often
    0 (Tango, Statistics in Medicine 17, 1998, pages 891 to 908). Numbers or arrays of one shape.

    Args:
        lost: images that one classifier has right and the other wrong.
        won: images that only the other has right.
        images: N.
        difference: of the two accuracies, a share above -1 and below 1.
    """
    lost, won = np.asarray(lost, dtype=np.float64), np.asarray(won, dtype=np.float64)
    linear = (2 * images - lost + won) * difference - lost - won
    constant = -won * difference * (1 - difference)
    likeliest = (np.sqrt(np.maximum(linear**2 - 8 * images * constant, 0)) - linear) / (4 * images)  # share won
    variance = images * (2 * likeliest + difference * (1 - difference))
    return (lost - won - images * difference) / np.sqrt(np.maximum(variance, 1e-300))
