"""The PNG figures of a run folder: accuracy against cost, and the curves of training."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adaptive.errors import MachineError
from adaptive.files import write_atomically
from adaptive.foreign_text import visible
from adaptive.reporting.interval_marks import band, bars
from adaptive.reporting.style import COLOURS, DASHES, MARKERS, STYLE, drawn
from adaptive.reporting.tables import human, tick_label
from adaptive.tracking.record_keys import exit_key, per_exit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LARGEST = 1e300  # that can be drawn


@dataclass(frozen=True)
class Curve:
    """The accuracies of one network at several costs: of its exits, or of a policy at several budgets.

    Attributes:
        label: its name in the legend; an anytime and a budgeted curve of one label share a colour.
        macs: multiply-adds of one image (for a budgeted curve: on average), rising.
        top1: accuracy in percent, one for each cost.
        kind: "anytime" is one point per exit, numbered; "budgeted" is a policy's curve, drawn dashed.
        ranges: interval of each accuracy in percent, drawn as a bar of an exit and a band of a budgeted curve.
        note: on how a budgeted curve came about, for the legend.
    """

    label: str
    macs: Sequence[float]
    top1: Sequence[float]
    kind: Literal["anytime", "budgeted"] = "anytime"
    ranges: Sequence[tuple[float, float]] = ()
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.macs) != len(self.top1):
            raise ValueError(f"curve {self.label!r}: {len(self.macs)} costs for {len(self.top1)} accuracies")


def accuracy_against_cost(curves: Sequence[Curve], path: str | Path, title: str = "", mark: str = "") -> Path:
    """Draw top-1 accuracy (%) over multiply-adds into a PNG, below a title and a mark in a line of its own.

    Returns the path; raises MachineError if the file cannot be written.
    """
    labels = list(dict.fromkeys(curve.label for curve in curves))
    with _figure(path, columns=1) as (_, [axes]):
        for curve in curves:
            _draw_curve(axes, curve, labels.index(curve.label))
        # A wide range of costs, as over several networks, crowds the cheap end of a linear axis.
        costs = [cost for curve in curves for cost in curve.macs if cost > 0]
        if costs and max(costs) > 20 * min(costs):
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: tick_label(human(value)))
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        heading = "\n".join([visible(title), *textwrap.wrap(mark, 60)])
        measured = "top-1 accuracy (%)" + (", 95 % intervals" if any(curve.ranges for curve in curves) else "")
        axes.set(xlabel="multiply-adds per image", ylabel=measured, title=heading)
        axes.margins(x=0.06, y=0.1)
        if curves:
            axes.legend(loc="lower right", markerscale=0.6)
    return Path(path)


def training_curves(records: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw loss and every exit's top-1 (%) over the steps, from the records of ``metrics.jsonl``, into a PNG.

    Validation is drawn solid, training thin and pale. Returns the path (MachineError if it cannot be written).
    """
    with _figure(path, columns=2) as (_, [losses, accuracies]):
        _draw_loss(losses, records)
        exits = sorted({number for split in ("train", "val") for r in records for number in per_exit(r, split, "top1")})
        for index, number in enumerate(exits):
            colour = COLOURS[index] if len(exits) <= len(COLOURS) else _shade(index / (len(exits) - 1))
            _draw_series(accuracies, records, exit_key("train", number, "top1"), color=colour, alpha=0.4, linewidth=1.1)
            _draw_series(
                accuracies, records, exit_key("val", number, "top1"), color=colour, marker="o", markersize=3.5, zorder=3
            )
            accuracies.plot([], [], color=colour, label=f"exit {number}")
        accuracies.set(xlabel="step", ylabel="top-1 accuracy (%)", title="Accuracy (validation bold, training pale)")
        if exits:
            accuracies.legend(loc="lower right", ncols=2 if len(exits) > 4 else 1)
    return Path(path)


@contextmanager
def _figure(path: str | Path, columns: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a styled figure with its axes, and write it as PNG at the end."""
    # Figure without pyplot: needs no window system, and is no part of pyplot's list of a user's own plots.
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(7.2 if columns == 1 else 5.6 * columns, 4.6), dpi=150, layout="tight")
        FigureCanvasAgg(figure)
        yield figure, list(figure.subplots(1, columns, squeeze=False)[0])
        content = io.BytesIO()
        figure.savefig(content, format="png")
        try:
            write_atomically(Path(path), content.getvalue())
        except OSError as error:
            raise MachineError(f"cannot write the figure {path}: {error.strerror or error}") from error


def _draw_curve(axes: Axes, curve: Curve, index: int) -> None:
    colour = COLOURS[index % len(COLOURS)]
    if curve.kind == "budgeted":
        label = "\n".join(map(drawn, filter(None, [f"{curve.label}, budgeted", curve.note])))
        axes.plot(curve.macs, curve.top1, color=colour, linestyle=DASHES, label=label)
        band(axes, curve.macs, curve.ranges, colour)
        return
    marker = MARKERS[index % len(MARKERS)]
    bars(axes, curve.macs, curve.ranges, colour)
    above = 3 + index  # a marker hides another curve's number beneath it, not only its marker
    axes.plot(
        curve.macs, curve.top1, color=colour, marker=marker, markersize=13, label=drawn(curve.label), zorder=above
    )
    for number, point in enumerate(zip(curve.macs, curve.top1, strict=True), start=1):
        axes.annotate(
            str(number), point, ha="center", va="center_baseline", fontsize=9, color="white", zorder=above + 0.5
        )


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw the exits' cross entropies, summed, of both; what training minimises is weighted and distilled."""
    summed = [{"step": r["step"], "sum": sum(own.values())} for r in records if (own := per_exit(r, "train", "loss"))]
    if summed:
        _draw_series(axes, summed, "sum", color=COLOURS[0], label="training", linewidth=1.2)
    else:
        _draw_series(axes, records, "train/loss", color=COLOURS[0], label="training's objective", linewidth=1.2)
    _draw_series(axes, records, "val/loss", color=COLOURS[1], label="validation", marker="o", markersize=3.5)
    axes.set(xlabel="step", ylabel="loss", title="Cross entropy, summed over the exits" if summed else "Loss")
    if axes.lines:
        axes.legend(loc="upper right")


def _draw_series(axes: Axes, records: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    """Plot one metric over the steps; a value that is not finite leaves a gap, one that is no number is left out."""
    found = [(r["step"], r[key]) for r in records if _is_number(r["step"]) and _is_number(r.get(key))]
    points = [(step, value if math.isfinite(value) else math.nan) for step, value in found]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not (math.isfinite(value) and abs(value) > LARGEST)


def _shade(fraction: float) -> str:
    """Return a colour of the viridis scale, for more exits than there are distinct colours."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"](0.9 * fraction))
