"""Which keys share a panel: only those that can be compared."""

import re

from adaptive.tracking.panels import SECTIONS


def test_losses_that_cannot_be_compared_are_drawn_apart() -> None:
    """What training minimises is weighted and distilled; validation's loss is the plain sum over the exits."""
    patterns = [panel.regex for section in SECTIONS for panel in section.panels if panel.regex]
    shown = {
        key: {p for p in patterns if re.search(p, key)} for key in ("train/loss", "train/cross_entropy", "val/loss")
    }
    assert shown["train/loss"]
    assert shown["val/loss"]
    assert not shown["train/loss"] & shown["val/loss"]
    assert shown["train/cross_entropy"] == shown["val/loss"]
