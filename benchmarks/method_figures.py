"""Draw the figures of docs/method.md: how the three techniques work, and what was measured about them.

    python benchmarks/method_figures.py

writes docs/figures/*.png and docs/figures/method.json (the numbers, with versions).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).parents[1]))
from adaptive.reporting.style import COLOURS, DOTS_PER_INCH, STYLE
from benchmarks.shared.locations import REPOSITORY
from benchmarks.shared.method_measures import Measures, measure
from benchmarks.shared.results import machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = REPOSITORY / "docs" / "figures"
BLUE, ORANGE, GREEN, PURPLE = COLOURS[:4]


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the figures")
    parser.add_argument("--draw-only", action="store_true", help="draw from the numbers in method.json")
    arguments = parser.parse_args()
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.draw_only:
        kept = json.loads((folder / "method.json").read_text())
        found = Measures(**{field.name: kept[field.name] for field in fields(Measures)})
    else:
        found = measure()
    with plt.rc_context(STYLE):  # type: ignore[arg-type]
        for name, draw in (("techniques", techniques), ("equilibrium", equilibrium), ("released", released)):
            figure = draw(found)
            figure.savefig(folder / f"{name}.png", dpi=DOTS_PER_INCH, bbox_inches="tight")
            plt.close(figure)
    if arguments.draw_only:
        return
    content = {"command": "python benchmarks/method_figures.py", "machine": machine("cpu"), **found.as_dict()}
    (folder / "method.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"{folder}: techniques.png, equilibrium.png, released.png, method.json")


def techniques(_: Measures) -> Any:
    """A network of three blocks with forks, links and the teacher."""
    figure, axes = plt.subplots(figsize=(10, 4.6))
    axes.set_axis_off()
    axes.set_xlim(-0.6, 10.2)
    axes.set_ylim(-0.6, 4.5)
    k = 3
    for i in range(k):
        x = 3.2 * i + 0.8
        _box(axes, x, 0.6, f"block {i + 1}", BLUE)
        _box(axes, x + 1.5, 2.2, f"exit {i + 1}", GREEN)
        _arrow(axes, (x - 1.6 if i else x - 1.1, 0.6), (x - 0.62, 0.6))
        axes.plot(x + 1.5, 0.6, "o", color="black", markersize=9)
        _arrow(axes, (x + 0.62, 0.6), (x + 1.4, 0.6))
        _arrow(axes, (x + 1.5, 0.7), (x + 1.5, 1.86))
        if i < k - 1:
            axes.text(x + 1.62, 1.2, f"$\\times\\,1/{k - i}$", color=ORANGE, fontsize=13)
            axes.text(x + 2.08, 0.2, f"$\\times\\,{k - i - 1}/{k - i}$", color=ORANGE, fontsize=13, ha="center")
            _arrow(axes, (x + 2.12, 2.2), (x + 4.08, 2.2), PURPLE)
            axes.text(x + 3.1, 2.32, "link", color=PURPLE, ha="center")
        _arrow(axes, (x + 1.5, 2.54), (x + 1.5, 3.1))
        axes.text(x + 1.5, 3.2, f"prediction {i + 1}", ha="center")
    for i in range(k - 1):
        x = 3.2 * i + 2.3
        style = {"arrowstyle": "->", "color": "#555555", "linestyle": "--", "connectionstyle": "arc3,rad=0.22"}
        axes.annotate("", (x, 3.5), (8.7, 3.5), arrowprops=style)
    axes.text(5.5, 4.42, "the last exit teaches the earlier ones (OFA)", color="#555555", ha="center", va="center")
    axes.text(-0.85, -0.35, "forks weigh the gradients that come back (GE)", color=ORANGE)
    axes.text(5.2, -0.35, "links carry predictions on, and no gradient back (ISC)", color=PURPLE)
    axes.text(-0.35, 0.6, "image", va="center", ha="right")
    return figure


def _box(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    shape = FancyBboxPatch((x - 0.5, y - 0.22), 1.0, 0.44, boxstyle="round,pad=0.1", facecolor=colour, edgecolor="none")
    axes.add_patch(shape)
    axes.text(x, y, text, color="white", ha="center", va="center", fontweight="bold")


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "black") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.6})


def equilibrium(found: Measures) -> Any:
    """What every block receives, and what an optimizer makes of it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    k = len(found.summed)
    places = range(1, k + 1)
    for values, label, colour, marker in (
        (found.summed, "summed loss", BLUE, "o"),
        (found.tap, "GE, tap scope (released code)", ORANGE, "s"),
        (found.crossing, "GE, crossing scope (published rule)", GREEN, "D"),
    ):
        _line(left, places, values, label, colour, marker)
    left.set(xlabel="block", ylabel="gradient norm / mean over the exits behind", xticks=list(places))
    left.set_title("What a block receives")
    left.set_ylim(0, None)
    left.legend()
    for name, label, colour, marker in (("sgd", "SGD", BLUE, "o"), ("adamw", "AdamW", PURPLE, "h")):
        _line(right, places, found.updates[name], label, colour, marker)
    right.plot(places, [1 / (k - j) for j in range(k)], ":", color="black", label="1 / exits at or behind the block")
    right.set(xlabel="block", ylabel="distance moved with GE / without", xticks=list(places))
    right.set_title("What an optimizer makes of it, 20 steps")
    right.set_ylim(0, None)
    right.legend()
    figure.tight_layout()
    return figure


def released(found: Measures) -> Any:
    """Two slips of the released code."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    exits = range(1, len(found.through_links) + 1)
    means = [100 * statistics.mean(v) for v in found.through_links]
    left.bar(list(exits), means, yerr=[100 * statistics.stdev(v) for v in found.through_links], color=PURPLE, width=0.6)
    left.set(xlabel="exit", ylabel="% of its own gradient", xticks=list(exits))
    left.set_title("Later losses reach earlier classifiers\nwhere the link has no stop")
    steps = range(len(found.drift))
    for run in zip(*found.drift, strict=True):
        right.plot(list(steps), [100 * v for v in run], color=BLUE)
    right.set(xlabel="batches seen in training mode", ylabel="change of the logits, %")
    right.set_title('A "frozen" network in training mode\nis another network soon (3 seeds)')
    figure.tight_layout()
    return figure


def _line(axes: Axes, places: range, values: list[list[float]], label: str, colour: str, marker: str) -> None:
    means, spread = [statistics.mean(v) for v in values], [statistics.stdev(v) for v in values]
    axes.errorbar(list(places), means, yerr=spread, label=label, color=colour, marker=marker, capsize=3)


if __name__ == "__main__":
    main()
