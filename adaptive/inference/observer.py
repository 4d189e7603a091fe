"""Observers of a run: what every runner tells of its parts, so that a clock can say where the time goes; no torch."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Called after every part of a run, as by the profiler's clock."""

    def __call__(self, part: str, i: int, samples: int) -> None:
        """Part number i, from 0, was done for so many images.

        ``part`` is "block", "exit" or "decision"; of an exported network, whose blocks hold their exits, "block" or
        "decision"; of an accelerated runner "stage", with the number of its last exit. After every decision that could
        let somebody leave comes "compaction", for as many images as stay: answers are written, and who stays was
        picked out, unless that is everybody or nobody. A run ends with "finish", for all images and with the number of
        the exit where it ended. What lies in front of the first part belongs to block 0; an empty batch has no parts.
        """


def tell(observe: Observer | None, part: str, i: int, samples: int) -> None:
    """Tell an observer, if there is one."""
    if observe is not None:
        observe(part, i, samples)
