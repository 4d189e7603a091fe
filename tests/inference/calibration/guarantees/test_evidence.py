from __future__ import annotations

import re

import pytest
import torch

from adaptive.inference.calibration.guarantees.evidence import (
    images_needed,
    images_needed_for_accuracy,
    of_accuracy,
    of_loss,
)
from adaptive.inference.calibration.guarantees.exact_test import accuracy_p_value, p_value
from adaptive.inference.calibration.guarantees.risk import accuracy_sequence, fixed_sequence
from adaptive.inference.calibration.thresholds import Choice, Scored, apply_thresholds


@pytest.mark.parametrize(("epsilon", "expected"), [(0.02, 227), (0.01, 459), (0.005, 919)])
def test_images_needed_are_the_fewest(epsilon: float, expected: int) -> None:
    assert images_needed(epsilon, 0.1) == expected
    tested = expected - expected // 2
    assert p_value(0, 0, tested, epsilon) <= 0.1 < p_value(0, 0, tested - 1, epsilon)


def test_a_rate_of_losses_takes_more_images_or_none() -> None:
    at_rate = images_needed(0.01, 0.1, lost=0.005, won=0.002)
    assert at_rate is not None
    assert at_rate > 459
    assert images_needed(0.01, 0.1, lost=0.02, won=0.005) is None
    assert images_needed(1e-6, 0.1) is None


def test_an_accuracy_needs_images_by_its_distance() -> None:
    near, far = (images_needed_for_accuracy(95, 0.95, observed) for observed in (96.0, 98.0))
    assert near is not None
    assert far is not None
    assert near > far
    tested = far - far // 2
    assert accuracy_p_value(int(tested * 0.98), tested, 0.95) <= 0.05
    assert images_needed_for_accuracy(95, 0.95, 95.0) is None


def _exits(images: int, lost: int) -> Scored:
    """Two exits that are always sure; the first one is wrong about the first images."""
    correct = torch.ones(2, images, dtype=torch.bool)
    correct[0, :lost] = False
    return Scored(torch.full((2, images), 0.9), correct)


@pytest.mark.parametrize(
    ("images", "lost", "shown", "words", "needed"),
    [
        (230, 0, True, "at most 1 point below the full network with probability 0.9 over the draw", None),
        (229, 0, False, "takes at least 459 held-out images, even with no loss at all; .*1.1 points could be", 459),
        (230, 1, False, "even the most careful policy lost 1 and won 0 of the 230 images of the test; at that", 1379),
        (230, 9, False, "lost 9 and won 0 of the 230 .*at that rate no number of images would do", None),
    ],
)
def test_what_is_said_about_a_loss(images: int, lost: int, shown: bool, words: str, needed: int | None) -> None:
    tested, costs = _exits(images, lost), [1.0, 2.0]
    candidate = Choice([0.5, -1e8], apply_thresholds(torch.tensor([0.5, -1e8]), tested, costs))
    found = fixed_sequence([candidate], tested, costs, 0.01, 0.1)
    said = of_loss(found, tested, 0.01, 0.1)
    assert (said.shown, said.images) == (shown, images)
    assert re.search(words, said.words), said.words
    assert (said.needed is None) == (needed is None)
    assert shown or "Nobody leaves early" in said.words


@pytest.mark.parametrize(
    ("early", "full", "words", "needed"),
    [
        (
            0.48,
            0.52,
            "half has 48.00 % of them right, at least 42.* in truth; at that accuracy it takes",
            True,
        ),
        (
            0.44,
            0.52,
            "half has 44.00 % .*; the full network has 52.00 %; ask for less, or give more",
            False,
        ),
        (0.40, 0.44, "the full network itself has 44.00 % right of the images of the test; ask for less", False),
    ],
)
def test_why_no_policy_has_an_accuracy_is_said_by_the_one_that_was_tested_first(
    early: float, full: float, words: str, needed: bool
) -> None:
    images, costs = 250, [1.0, 2.0]
    correct = torch.stack([torch.arange(images) < round(share * images) for share in (early, full)])
    tested = Scored(torch.full((2, images), 0.9), correct)
    first = Choice([0.5, -1e8], apply_thresholds(torch.tensor([0.5, -1e8]), tested, costs))
    found = accuracy_sequence([first], tested, costs, 45.0, 0.95)
    said = of_accuracy(found, tested, 45.0, 0.95, 45.0)
    assert not said.shown
    assert re.search(words, said.words), said.words
    assert "Nobody leaves early" in said.words
    assert (said.needed is not None) == needed
    assert said.needed is None or said.needed > 2 * images, "more than were not enough"
