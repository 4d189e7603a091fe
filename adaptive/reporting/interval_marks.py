"""Intervals in a figure: bars of single points, a pale band of a curve; both below what they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAND = 0.13  # opacity: four bands above each other leave the lines readable


def bars(axes: Axes, costs: Sequence[float], ranges: Sequence[tuple[float, float]], colour: str) -> None:
    """Draw a thin vertical bar for the interval of each point's accuracy in percent; nothing without intervals."""
    if ranges:
        low, high = zip(*ranges, strict=True)
        axes.vlines(costs, low, high, colors=colour, linewidth=1.2, alpha=0.75, zorder=2.5)


def band(axes: Axes, costs: Sequence[float], ranges: Sequence[tuple[float, float]], colour: str) -> None:
    """Shade the intervals along a curve; nothing without intervals."""
    if ranges:
        low, high = zip(*ranges, strict=True)
        axes.fill_between(costs, low, high, color=colour, alpha=_BAND, linewidth=0, zorder=1.5)


def cross(
    axes: Axes,
    point: tuple[float, float],
    accuracy: tuple[float, float],
    cost: tuple[float, float] | None,
    colour: str,
    above: float,
) -> None:
    """Draw the intervals of a single point's accuracy in percent, and of its cost if it is known, behind its marker."""
    style: dict[str, Any] = {"color": colour, "linewidth": 1.6, "zorder": above}
    axes.plot([point[0]] * 2, accuracy, **style)
    if cost is not None:
        axes.plot(cost, [point[1]] * 2, **style)
