"""Keys of a run's records: ``val/loss`` for the network, ``val/exit_1/top1`` for what each exit has of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def exit_key(group: str, number: int | str, name: str) -> str:
    """Spell the key of one exit's value.

    Args:
        group: ``train``, ``val``, ``val_ema`` (the moving average) or ``model`` (costs).
        number: of the exit, from 1; or a regular expression for it.
        name: of the value, such as ``top1``.
    """
    return f"{group}/exit_{number}/{name}"


def exit_records(values: Mapping[str, Sequence[float]], group: str) -> dict[str, float]:
    """Turn values by name, of k exits each, into a record."""
    return {exit_key(group, i, name): value for name in values for i, value in enumerate(values[name], start=1)}


def per_exit(record: Mapping[str, Any], group: str, name: str) -> dict[int, float]:
    """Read one value of every exit back from a record: ``{1: ..., 2: ...}``, in the order of the exits."""
    pattern = re.compile(exit_key(group, r"(\d+)", name))
    found = {int(match[1]): record[key] for key in record if (match := pattern.fullmatch(key))}
    return dict(sorted(found.items()))
