"""Which checkpoints stay: the newest, the best, and of every n-th epoch the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adaptive.training.checkpoints.store import Checkpoint


def retained(
    checkpoints: Sequence[Checkpoint], keep: int, keep_every: int, is_sound: Callable[[Checkpoint], bool]
) -> set[Path]:
    """Return the folders that stay: the ``keep`` newest sound ones, the best sound one, and what is kept for ever.

    ``is_sound`` may be slow: it is asked only about candidates, newest and best first.
    """
    return {c.path for c in newest(checkpoints, keep, is_sound)} | {
        c.path for c in (best(checkpoints, is_sound), *lasting(checkpoints, keep_every)) if c is not None
    }


def newest(checkpoints: Iterable[Checkpoint], count: int, is_sound: Callable[[Checkpoint], bool]) -> list[Checkpoint]:
    """Return the newest sound ones, at most ``count``."""
    found: list[Checkpoint] = []
    for checkpoint in sorted(checkpoints, key=lambda c: c.step, reverse=True):
        if len(found) == count:
            break
        if is_sound(checkpoint):
            found.append(checkpoint)
    return found


def best(checkpoints: Iterable[Checkpoint], is_sound: Callable[[Checkpoint], bool]) -> Checkpoint | None:
    """Return the sound one of most merit (latest phase, highest score, newest); None without any score."""
    scored = [c for c in checkpoints if c.score is not None]
    return next((c for c in sorted(scored, key=lambda c: c.merit, reverse=True) if is_sound(c)), None)


def lasting(checkpoints: Iterable[Checkpoint], keep_every: int) -> list[Checkpoint]:
    """Return what is kept for ever: of every ``keep_every``-th epoch the last; nothing for 0."""
    last = {c.epoch: c for c in sorted(checkpoints, key=lambda c: c.step) if c.epoch and keep_every}
    return [checkpoint for epoch, checkpoint in last.items() if epoch and epoch % keep_every == 0]
