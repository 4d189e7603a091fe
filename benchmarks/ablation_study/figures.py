"""The ablation's figures: accuracy against cost with its deviation over seeds, and the exits' gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptive.reporting.style import COLOURS, DOTS_PER_INCH, MARKERS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEAT = {"font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "axes.grid": False, "figure.facecolor": "white"}


def accuracy(result: Mapping[str, Any], path: Path) -> None:
    """Draw every exit's test accuracy and the budgeted curves over MMACs, mean and standard deviation over seeds."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(13.2, 4.9), dpi=DOTS_PER_INCH, layout="tight")
        FigureCanvasAgg(figure)
        exits, budgeted = figure.subplots(1, 2, sharey=True)
        for index, (name, entry) in enumerate(result["variants"].items()):
            _draw_exits(exits, entry, name, index, len(result["variants"]))
            _draw_curve(budgeted, entry["curve"], name, COLOURS[index % len(COLOURS)])
        seeds = len(result["seeds"])
        spread = f"mean ± s.d. of {seeds} seeds, points set apart" if seeds > 1 else "one seed"
        exits.set(title=f"Every exit ({spread})", ylabel="test top-1 (%)")
        budgeted.set(title="Budgeted: geometric calibration on val, applied on test")
        for axes in (exits, budgeted):
            axes.set_xlabel("million multiply-adds per image")
            axes.legend(loc="lower right")
        figure.savefig(path, format="png")


def _draw_exits(axes: Axes, entry: Mapping[str, Any], name: str, index: int, variants: int) -> None:
    macs, top1 = np.array(entry["macs"]) / 1e6, entry["test_top1"]
    # Set apart, so that error bars of equal costs do not lie on each other.
    apart = 0.012 * (macs[-1] - macs[0]) * (index - (variants - 1) / 2)
    axes.errorbar(
        macs + apart,
        top1["mean"],
        yerr=top1["sd"],
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        markersize=6,
        capsize=3,
        label=name,
    )


def _draw_curve(axes: Axes, curve: Mapping[str, Any], name: str, colour: str) -> None:
    macs, mean = np.array(curve["test_macs"]["mean"]) / 1e6, np.array(curve["test_top1"]["mean"])
    axes.plot(macs, mean, color=colour, label=name)
    if curve["test_top1"]["sd"] is not None:
        deviation = np.array(curve["test_top1"]["sd"])
        axes.fill_between(macs, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0)


def gradients(result: Mapping[str, Any], path: Path) -> None:
    """Draw, for the first two variants, norms per exit and block and cosines in the first block, moment by moment."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = list(result["gradients"].items())[:2]
    moments = len(shown[0][1])
    with style.context(["default", HEAT]):
        figure = Figure(figsize=(3.6 * moments + 0.4, 3.1 * 2 * len(shown)), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2 * len(shown), moments, squeeze=False)
        top = max(v for _, records in shown for record in records for row in record["norms"]["mean"] for v in row)
        for row, (name, records) in enumerate(shown):
            for column, record in enumerate(records):
                norms, cosines = grid[2 * row, column], grid[2 * row + 1, column]
                values = np.array(record["norms"]["mean"])
                values[np.triu_indices(len(values), 1)] = np.nan  # blocks behind the exit
                _heat(norms, values, f"{name}, step {record['step']}: norms", "viridis", (0, top))
                norms.set(xlabel="block", ylabel="exit")
                _heat(
                    cosines, np.array(record["cosines"]["mean"][0], dtype=float),
                    f"{name}, step {record['step']}: cosines in block 1", "RdBu", (-1, 1),
                )  # fmt: skip
                cosines.set(xlabel="exit", ylabel="exit")
        figure.savefig(path, format="png")


def _heat(axes: Axes, values: np.ndarray, title: str, colours: str, limits: Sequence[float]) -> None:
    axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1])
    numbers = [str(i) for i in range(1, len(values) + 1)]
    axes.set_xticks(range(len(values)), numbers)
    axes.set_yticks(range(len(values)), numbers)
    axes.set_title(title)
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            share = (value - limits[0]) / (limits[1] - limits[0])
            # Viridis is dark below, RdBu at both ends.
            dark = share < 0.55 if colours == "viridis" else abs(share - 0.5) > 0.32
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize=8)
