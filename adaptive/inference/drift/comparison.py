"""A test of whether counts of images come from the same images: chi-square over exits and confidences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from adaptive.errors import PolicyError
from adaptive.inference.drift.counts import Counts

LEAST_EXPECTED = 5.0  # images in a cell of either side, below which the chi-square distribution is no good guide
LEAST_SHARE = 0.05  # of the images in a cell: over more cells the same change shows less
POWER = 0.9
ENOUGH = 0.25  # share of the images whose change has to show for a test to be worth its name
_MOST_IMAGES = 1 << 24


@dataclass(frozen=True)
class Comparison:
    """The outcome of a test.

    Attributes:
        verdict: "alike", "drifted", or "too few" images to tell.
        p_value: probability of counts that differ so much, where the images are alike.
        statistic: chi-square of the cells.
        cells: how many were compared, after those with few images were merged.
        visible: smallest share of images whose change the test would have shown, nine times in ten; None for none.
        enough: how many images would be enough, where there are too few; None where the calibration has too few.
    """

    verdict: Literal["alike", "drifted", "too few"]
    p_value: float
    statistic: float
    cells: int
    visible: float | None
    enough: int | None


def compare(then: Counts, now: Counts, false_alarms: float) -> Comparison:
    """Test whether two sets of images were drawn alike, by where they left and how sure the exits were.

    A two-sample chi-square test of homogeneity over the cells (exit, bin of confidence). Cells are merged by the sums
    over both sets, which say nothing about a difference between them: conditional on these sums the counts of one set
    are hypergeometric where the images are alike, whichever cells were merged.

    Args:
        then: of the images that the policy was calibrated on.
        now: of those that it has seen.
        false_alarms: how often alike images may be called drifted.

    Raises:
        PolicyError: counts of other exits or bins; a rate that is none.
    """
    from scipy.stats import chi2

    if not 0 < false_alarms < 1:
        raise PolicyError(f"false alarms {false_alarms:g}: give a probability between 0 and 1")
    then.check_like(now)
    pairs = merged(then.cells, now.cells)
    statistic = homogeneity(pairs)
    p_value = float(chi2.sf(statistic, len(pairs) - 1)) if len(pairs) > 1 else 1.0
    visible = detectable(then.images, now.images, len(pairs), false_alarms)
    if p_value <= false_alarms:
        return Comparison("drifted", p_value, statistic, len(pairs), visible, None)
    few = visible is None or visible > ENOUGH
    enough = _enough(then, false_alarms) if few else None
    return Comparison("too few" if few else "alike", p_value, statistic, len(pairs), visible, enough)


def merged(then: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Return counts of both sides in cells that hold enough images of each, were the two alike.

    Neighbouring bins of an exit are joined, from the least sure on, until `LEAST_EXPECTED` images, and `LEAST_SHARE` of
    all, are expected on the smaller side; an exit with too few in all is joined with the next one.
    """
    images = sum(map(sum, then)), sum(map(sum, now))
    if not min(images):
        return [images]
    least = max(LEAST_EXPECTED / min(images), LEAST_SHARE) * sum(images)
    cells: list[tuple[int, int]] = []
    waiting = (0, 0)
    for rows in zip(then, now, strict=True):
        own: list[tuple[int, int]] = []
        for a, b in zip(*rows, strict=True):
            waiting = waiting[0] + a, waiting[1] + b
            if sum(waiting) >= least:
                own.append(waiting)
                waiting = (0, 0)
        if own:  # the rest are the surest of this exit
            own[-1] = own[-1][0] + waiting[0], own[-1][1] + waiting[1]
            waiting = (0, 0)
        cells += own
    if sum(waiting):
        last = cells.pop() if cells else (0, 0)
        cells.append((last[0] + waiting[0], last[1] + waiting[1]))
    return cells


def homogeneity(pairs: Sequence[tuple[int, int]]) -> float:
    """Return Pearson's chi-square of two rows of counts, of which each column holds something."""
    a, b = (sum(side) for side in zip(*pairs, strict=True))
    if not a or not b:
        return 0.0
    return sum((x * b - y * a) ** 2 / (x + y) for x, y in pairs) / (a * b)


def detectable(then: int, now: int, cells: int, false_alarms: float) -> float | None:
    """Return the share of images that has to change sides for the test to show it with probability `POWER`.

    For a set that two equal halves make up, of which one grows by that share: an effect of w = 2 share, and a
    noncentrality of w^2 then now / (then + now) (Cohen, 1988, chapter 7). None where not even a half would show.
    """
    if cells < 2 or not then or not now:
        return None
    share = math.sqrt(_noncentrality(cells - 1, false_alarms) * (then + now) / (then * now)) / 2
    return share if share <= 0.5 else None


@cache
def _noncentrality(freedom: int, false_alarms: float) -> float:
    """Return the noncentrality of a chi-square that is above the alarm's bound with probability `POWER`."""
    from scipy.optimize import brentq
    from scipy.stats import chi2, ncx2

    bound = chi2.isf(false_alarms, freedom)
    return float(brentq(lambda value: ncx2.sf(bound, freedom, value) - POWER, 1e-9, 1e4))


def _enough(then: Counts, false_alarms: float) -> int | None:
    """Return how many images show a change of `ENOUGH` if they leave as the calibration's did; None if none do."""
    images, number = then.images, 1
    while number < _MOST_IMAGES:
        like = [[count * number / images for count in row] for row in then.cells]
        cells = len(merged(then.cells, like))  # type: ignore[arg-type]
        found = detectable(images, number, cells, false_alarms)
        if found is not None and found <= ENOUGH:
            return number
        number += max(1, number // 20)
    return None
