"""The report's figures of exits: how many images leave at each, their accuracy, classes, calibration and confusion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptive.inference.calibration.reliability import reliability
from adaptive.reporting.accuracy_curves import entitle, marked, short
from adaptive.reporting.class_statistics import class_shares, confusion
from adaptive.reporting.drawing import Drawing, draw
from adaptive.reporting.report_data import RunReport
from adaptive.reporting.style import COLOURS, DASHES, GRID, INK, MARKERS, MUTED, PAPER, drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE = COLOURS[0], COLOURS[1]
MAX_OPACITY = 0.65  # of a cell, low enough that text stays readable on it in both themes
FEW_CLASSES = 20  # of more, a selection is drawn, or a table is shown instead
MIN_BIN_IMAGES = 5  # in a bin that is drawn: the accuracy of one or two says nothing
_TEXT_SHARE = 0.09  # of the images; the segment of a smaller share is too narrow for its text


def stem(run: RunReport, runs: Sequence[RunReport], what: str) -> str:
    """Return the name of a run's figure: number and name of the run, where there are several, and what it shows."""
    if len(runs) == 1:
        return what
    return f"{runs.index(run) + 1}_{re.sub(r'[^A-Za-z0-9_-]+', '-', run.name).strip('-')}_{what}"


def shares(runs: Sequence[RunReport]) -> Drawing | None:
    """Draw how many images leave at each exit, a bar per run; None where no run has a policy."""
    able = [run for run in runs if run.policy]
    if not able:
        return None
    caption = "Share of images that leave at each exit, first exit on the left."
    alt = f"{caption} " + " ".join(
        f"{run.name}: " + ", ".join(f"exit {i} {100 * s:.1f} %" for i, s in enumerate(run.shares, 1)) + "."
        for run in able
    )

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row, run in enumerate(able):
            start, last = 0.0, len(run.macs) - 1
            for i, share in enumerate(run.shares):
                alpha = MAX_OPACITY - (MAX_OPACITY - 0.12) * i / max(1, last)
                axes.barh(row, share, left=start, height=0.62, facecolor=(BLUE, alpha), edgecolor=INK, linewidth=0.8)
                if share >= _TEXT_SHARE:
                    axes.text(start + share / 2, row + 0.01, f"{i + 1}", ha="center", va="bottom", weight="bold")
                    axes.text(start + share / 2, row + 0.02, f"{100 * share:.0f} %", ha="center", va="top")
                start += share
            axes.text(0, row - 0.36, short(run.name, 44), ha="left", va="bottom")
        axes.set(xlim=(0, 1), ylim=(len(able) - 0.5, -0.75), yticks=[], xlabel="share of images")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.get_xticklabels()[-1].set_horizontalalignment("right")
        axes.spines[["left"]].set_visible(False)
        axes.grid(visible=False)

    return draw("shares", paint, caption, alt, height=max(2.0, 0.9 + 0.72 * len(able)))


def leavers(runs: Sequence[RunReport]) -> Drawing | None:
    """Draw the accuracy of the images that leave at each exit; None where no run has a policy."""
    able = [run for run in runs if run.policy]
    if not able:
        return None
    caption = f"{marked(able)}Accuracy of the images that leave at each exit."
    if len(able) == 1:
        caption += " Hollow: what the last exit would have made of the same images."

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        entitle(axes, marked(able))
        for i, run in enumerate(able):
            numbers = [n for n in range(1, len(run.macs) + 1) if len(run.left_at(n))]
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            if len(able) == 1:
                full = [100 * float(np.mean((run.answers[-1] == run.labels)[run.left_at(n)])) for n in numbers]
                axes.plot(numbers, full, **_hollow(MUTED), markersize=9, label="by the last exit")
            values = [run.accuracy_at(n) for n in numbers]
            label = "where they leave" if len(able) == 1 else drawn(short(run.name, 18))
            axes.plot(numbers, values, **style, markersize=8, label=label)  # type: ignore[arg-type]
        most = max(len(run.macs) for run in able)
        axes.set(xlabel="exit", ylabel="accuracy of those that leave (%)", xticks=range(1, most + 1))
        axes.set_xlim(0.7, most + 0.3)
        axes.margins(y=0.1)
        figure.legend(loc="outside lower center", ncols=2)

    alt = f"{caption} " + " ".join(
        f"{run.name}: "
        + ", ".join(
            f"exit {n} {found:.1f} %" for n in range(1, len(run.macs) + 1) if (found := run.accuracy_at(n)) is not None
        )
        + "."
        for run in able
    )
    return draw("leavers", paint, caption, alt, height=3.5 + 0.22 * -(-max(2, len(able)) // 2))


def classes(run: RunReport, name: str) -> Drawing:
    """Draw which classes leave early: a matrix of classes, earliest above, and exits. The run needs a policy."""
    found = class_shares(run)
    mean_exit = np.nansum(found * np.arange(1, len(run.macs) + 1), axis=1)
    present = np.flatnonzero(~np.isnan(found[:, 0]))
    order = present[np.argsort(mean_exit[present], kind="stable")]
    many = len(order) > FEW_CLASSES
    rows = [*order[: FEW_CLASSES // 2], None, *order[-FEW_CLASSES // 2 :]] if many else list(order)
    what = f"the {FEW_CLASSES // 2} earliest and latest of {len(order)} classes" if many else "every class"
    caption = f"Which classes leave early: percent of {what} that leave at each exit, earliest class above."
    alt = f"{caption} Earliest: {run.classes[order[0]]}, latest: {run.classes[order[-1]]}."

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, row in enumerate(rows):
            if row is None:
                axes.text((len(run.macs) - 1) / 2, y, "⋯", ha="center", va="center", color=MUTED)
                continue
            for x, share in enumerate(found[row]):
                _cell(axes, x, y, BLUE, float(share), f"{100 * share:.0f}")
        _matrix(axes, len(run.macs), len(rows))
        axes.set_xticks(range(len(run.macs)), [str(i + 1) for i in range(len(run.macs))])
        axes.set_yticks(range(len(rows)), ["" if row is None else short(run.classes[row], 16) for row in rows])
        axes.set_xlabel("exit")

    return draw(name, paint, caption, alt, height=0.7 + 0.29 * max(4, len(rows)))


def calibration(run: RunReport, number: int, name: str) -> Drawing:
    """Draw the reliability of an exit's confidence, before and after the policy's temperature where it has one."""
    right = run.answers[number - 1] == run.labels
    before = reliability(run.confidences[number - 1], right)
    scaled = run.policy is not None and run.calibrated is not None
    temperature = run.policy.temperatures[number - 1] if run.policy and scaled else 1.0
    after = reliability(run.calibrated[number - 1], right) if run.calibrated is not None else None
    said = f"ECE {before.ece:.1f} %"
    if after:
        said += f", after temperature {temperature:.2f}: {after.ece:.1f} %"
    caption = f"Exit {number}: {said}."

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        shown = after or before
        enough = MIN_BIN_IMAGES / len(right)
        axes.bar(shown.confidence, shown.share, width=0.045, facecolor=GRID, zorder=1)
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.2, linestyle=(0, (1, 2)))
        if after:
            axes.plot(*before.points(enough), **_hollow(ORANGE), markersize=6, label="as trained")
        label = f"T = {temperature:.2f}" if after else "as trained"
        axes.plot(*shown.points(enough), color=BLUE, marker="o", markersize=6, label=label)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", title=f"exit {number}")
        figure.legend(loc="outside lower center", ncols=2, handlelength=2.2)

    alt = f"Reliability diagram of exit {number}: {said}; grey bars: share of images per bin."
    return draw(name, paint, caption, alt, width=3.9, height=3.5)


def confusions(run: RunReport, number: int, name: str) -> Drawing | None:
    """Draw the confusion matrix of the images that leave at an exit; None where none does, or for many classes."""
    here = run.left_at(number)
    if not len(here) or len(run.classes) > FEW_CLASSES:
        return None
    counts = confusion(run, number)
    rows = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(run.classes)
    wrong = int(counts.sum() - np.trace(counts))
    caption = f"Exit {number}: {len(here):,} images leave, {wrong:,} of them wrong."

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for y, x in np.argwhere(counts > 0):
            text = _count(int(counts[y, x])) if size <= 10 else ""
            _cell(axes, x, y, BLUE if x == y else ORANGE, float(rows[y, x]), text)
        _matrix(axes, size, size)
        names = [short(label, 12) for label in run.classes]
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), names)
        axes.set(xlabel="answer", ylabel="true class", title=f"exit {number}")

    alt = f"Confusion matrix of the images that leave at exit {number}: {caption}"
    return draw(name, paint, caption, alt, height=4.8)


def _hollow(colour: str) -> dict[str, Any]:
    return {"color": colour, "linestyle": DASHES, "marker": "s", "markerfacecolor": PAPER}


def _count(number: int) -> str:
    return str(number) if number < 1000 else f"{number / 1000:.2g}k"


def _cell(axes: Axes, x: int, y: int, colour: str, share: float, text: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=(colour, MAX_OPACITY * share), edgecolor="none"))
    if text:
        axes.text(x, y, text, ha="center", va="center_baseline")


def _matrix(axes: Axes, columns: int, rows: int) -> None:
    """Frame cells of unit size, first row above."""
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(visible=False, which="major")
    axes.grid(visible=True, which="minor", color=GRID, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
