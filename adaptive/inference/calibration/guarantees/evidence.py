"""What a test on held-out images says about a target: kept, or why that is not shown and how many images would do."""

from __future__ import annotations

import math
from collections.abc import Callable

from adaptive.inference.calibration.guarantees.exact_test import accuracy_p_value, p_value
from adaptive.inference.calibration.guarantees.risk import Tested, lost_and_won
from adaptive.inference.calibration.thresholds import Choice, Scored
from adaptive.inference.intervals import lower_bound
from adaptive.inference.policy import Evidence

MOST_IMAGES = 1_000_000  # held-out images that are worth a mention


def images_needed(epsilon: float, delta: float, lost: float = 0.0, won: float = 0.0) -> int | None:
    """Return the least number of held-out images, half of them for the test, with which a bounded loss can be shown.

    Args:
        epsilon: accuracy that may be lost, as a share.
        delta: how often the bound may fail.
        lost: share of the images that a policy loses; 0 is the best that any policy can do.
        won: share that it wins.

    Returns:
        The number, or None where a million would not do.
    """

    def passes(images: int) -> bool:
        return p_value(math.ceil(lost * images - 1e-9), math.floor(won * images + 1e-9), images, epsilon) <= delta

    return _held_out(passes) if lost - won < epsilon else None


def images_needed_for_accuracy(top1: float, confidence: float, observed: float, failed: int = 0) -> int | None:
    """Return the least number of held-out images, half for the test, that show an accuracy where one is observed.

    Args:
        top1: accuracy to show, in percent.
        confidence: of the test.
        observed: accuracy on the images of the test, in percent.
        failed: images of a test that did not show it.

    Returns:
        The number, or None where a million would not do.
    """

    def passes(images: int) -> bool:
        right = math.floor(observed * images / 100 + 1e-9)
        return accuracy_p_value(right, images, top1 / 100) <= 1 - confidence

    return _held_out(passes, failed) if observed > top1 else None


def _held_out(passes: Callable[[int], bool], failed: int = 0) -> int | None:
    """Return 2 n - 1 for the least n above ``failed`` that passes, up to the steps of whole numbers of images."""
    low, high = failed, failed + 1
    while not passes(high):
        low, high = high, 2 * high
        if 2 * high > MOST_IMAGES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return 2 * high - 1


def of_loss(found: Tested, tested: Scored, epsilon: float, delta: float) -> Evidence:
    """Say what the sequence of tests showed about a loss of at most epsilon."""
    images = len(found.outcome.leaves)
    asked = f"at most {_points(100 * epsilon)} below the full network with probability {1 - delta:g}"
    if found.passed:
        words = f"{asked} over the draw of the held-out images, by a test on {images:,} of them that chose nothing"
        return Evidence(shown=True, images=images, words=words)
    least = images_needed(epsilon, delta)
    if least is None:
        return _nothing(images, None, f"{asked} takes over {MOST_IMAGES:,} held-out images; ask for less")
    if images < (least + 1) // 2:
        words = f"{asked} takes at least {least:,} held-out images, even with no loss at all; give as many, or ask for "
        return _nothing(images, least, f"{words}less ({_weaker(images, delta)})")
    lost, won = lost_and_won(found.first, tested)
    words = f"even the most careful policy lost {lost} and won {won} of the {images:,} images of the test"
    needed = images_needed(epsilon, delta, lost / images, won / images)
    if needed is None:
        return _nothing(images, None, f"{words}; at that rate no number of images would do, so allow a larger loss")
    return _nothing(images, needed, f"{words}; at that rate {needed:,} held-out images would do")


def of_accuracy(choice: Choice, tested: Scored, top1: float, confidence: float, bound: float) -> Evidence:
    """Say what the images of the test showed about an accuracy.

    Args:
        choice: the thresholds, with their outcome on the images of the test; `Tested` where they were chosen so that
            the bound keeps the target.
        tested: the answers to these images.
        top1: accuracy asked for, in percent.
        confidence: of the bound.
        bound: lower bound on the accuracy in truth, in percent.
    """
    images = len(choice.outcome.leaves)
    if bound >= top1 and not (isinstance(choice, Tested) and not choice.passed):
        words = f"at least {bound:.4g} % right in truth with confidence {confidence:g}, by a test on {images:,} of the "
        return Evidence(shown=True, images=images, words=f"{words}held-out images that chose nothing")
    words = (
        f"{top1:g} % right in truth with confidence {confidence:g} is not shown by {images:,} images that chose nothing"
    )
    full = 100 * tested.correct[-1].double().mean().item()
    if isinstance(choice, Tested):
        return _of_first(choice, words, top1, confidence, full)
    needed = images_needed_for_accuracy(top1, confidence, full)
    if full <= top1:
        remedy = _full_is_worse(full)
    elif needed is None:
        remedy = f"the full network has {full:.2f} % right of them, for which a million would not do; ask for less"
    elif needed > 2 * images:
        remedy = f"at the full network's accuracy on them ({full:.2f} %) it takes {needed:,} held-out images"
    else:
        remedy = f"--confidence {confidence:g} chooses a policy of which it is shown, if there is one"
        needed = None
    return Evidence(shown=False, images=images, needed=needed, words=f"{words}, at least {bound:.2f} % is; {remedy}")


def _of_first(choice: Tested, words: str, top1: float, confidence: float, full: float) -> Evidence:
    """Say why no policy passed: by the one that was tested first, which was the most accurate where it was chosen."""
    images, best = len(choice.first.outcome.leaves), choice.first.outcome.top1
    least = lower_bound(round(best * images / 100), images, confidence)
    words += (
        f": the most accurate policy of the other half has {best:.2f} % of them right, at least {least:.2f} % in truth"
    )
    needed = images_needed_for_accuracy(top1, confidence, best, images) if full > top1 else None
    if full <= top1:
        remedy = _full_is_worse(full)
    elif needed is None:
        remedy = f"the full network has {full:.2f} %; ask for less, or give more held-out images to choose it on"
    else:
        remedy = f"at that accuracy it takes {needed:,} held-out images"
    return _nothing(images, needed, f"{words}; {remedy}")


def _full_is_worse(full: float) -> str:
    return f"the full network itself has {full:.2f} % right of the images of the test; ask for less"


def _nothing(images: int, needed: int | None, words: str) -> Evidence:
    return Evidence(shown=False, images=images, needed=needed, words=f"{words}. Nobody leaves early")


def _weaker(images: int, delta: float) -> str:
    """Return what loss so many images of a test could show: that of (1 - epsilon)^images = delta, rounded up."""
    points = 100 * (1 - delta ** (1 / images))
    return f"{_points(math.ceil(10 * points + 0.01) / 10)} could be shown by these {images:,}"


def _points(number: float) -> str:
    return f"{number:g} point{'' if number == 1 else 's'}"
