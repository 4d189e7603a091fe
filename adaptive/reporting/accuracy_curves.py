"""The report's curves: accuracy against multiply-adds and milliseconds, runs and published numbers together."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptive.inference.intervals import Interval
from adaptive.reporting.drawing import Drawing, draw
from adaptive.reporting.interval_marks import band, bars, cross
from adaptive.reporting.published import REFERENCES, TITLES, Reference
from adaptive.reporting.report_data import RunReport
from adaptive.reporting.run_intervals import exit_range, policy_intervals, policy_range
from adaptive.reporting.style import COLOURS, DASHES, MARKERS, MUTED, PAPER, drawn
from adaptive.reporting.tables import human, tick_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Point = tuple[float, float]
_NUMBERED_INSIDE = 2  # runs; of more, the exits' numbers are beside small markers instead of inside large ones
_REFERENCE_MARKERS = ("^", "v", "<", ">", "d")


@dataclass(frozen=True)
class Series:
    """One run's points (cost, top-1 in percent): its exits, the curve of its policies, its own policy.

    ``ranges`` are the intervals of the exits' accuracies, ``band`` those along the curve (cost, low and high), ``star``
    those of the policy: of its accuracy, and of its cost if it is known.
    """

    label: str
    anytime: list[Point]
    budgeted: list[Point]
    policy: Point | None
    ranges: Sequence[Interval] = ()
    band: Sequence[tuple[float, Interval]] = ()
    star: tuple[Interval, Interval | None] | None = None


def against_macs(runs: Sequence[RunReport], published: str | None) -> Drawing:
    """Draw accuracy against multiply-adds; ``published`` names the data set whose published numbers are shown."""
    series = [
        Series(
            run.name,
            list(zip(run.macs, run.top1, strict=True)),
            [(p.cost, p.top1) for p in run.budgeted],
            (run.policy_macs, run.policy_top1) if run.policy else None,
            [exit_range(run, i + 1) for i in range(len(run.macs))],
            [(p.cost, p.top1_range) for p in run.budgeted if p.top1_range],
            (policy_range(run), policy_intervals(run)["macs_interval"]) if run.policy else None,
        )
        for run in runs
    ]
    references = REFERENCES[published] if published else ()
    caption = f"{marked(runs)}Accuracy against multiply-adds per image. {_explain(series)}"
    if references:
        caption += f" Grey: published on {TITLES[str(published)]}, {_sources(references)}."
    return _draw("accuracy_macs", series, references, "multiply-adds per image", human, caption, marked(runs))


def against_milliseconds(runs: Sequence[RunReport], name: str = "accuracy_ms", remark: str = "") -> Drawing | None:
    """Draw accuracy against milliseconds of those runs that were timed, together; None where none was.

    ``name`` is the figure's, ``remark`` the caption's first sentence.
    """
    timed = [run for run in runs if run.timing]
    if not timed:
        return None
    series = [
        Series(
            run.name,
            list(zip(run.timing.milliseconds, run.top1, strict=True)),
            sorted((run.mean_milliseconds(p.shares), p.top1) for p in run.budgeted),
            (run.mean_milliseconds(run.shares), run.policy_top1) if run.policy else None,
            [exit_range(run, i + 1) for i in range(len(run.macs))],
            sorted((run.mean_milliseconds(p.shares), p.top1_range) for p in run.budgeted if p.top1_range),
            (policy_range(run), None) if run.policy else None,
        )
        for run in timed
        if run.timing
    ]
    places = list(dict.fromkeys(where(run) for run in timed))
    how = "timed together, interleaved, in one process, on" if len(timed) > 1 else "measured on"
    caption = f"{marked(timed)}{remark}Accuracy against milliseconds per image, {how} {'; '.join(places)}. "
    caption += _explain(series) + _how_policies_were_timed(timed)
    # A processor's full name is wider than the figure.
    label = "\n".join(["milliseconds per image", *(textwrap.wrap(places[0], 42) if len(places) == 1 else ())])
    return _draw(name, series, (), label, lambda value: f"{value:.3g} ms", caption, marked(timed))


def _how_policies_were_timed(runs: Sequence[RunReport]) -> str:
    """Return what to append to the caption on how milliseconds of policies come about, if any are drawn."""
    if not any(run.budgeted or run.policy for run in runs):
        return ""
    old = [run.name for run in runs if run.timing and run.timing.model is None]
    if not old:
        return " Policies by the model of time: every part at the number of images that are still in."
    return (
        f" Policies of {', '.join(old)} are computed from full-batch times, and too cheap: their batches shrink. Run "
        "adaptive evaluate again."
    )


def where(run: RunReport) -> str:
    """Return the machine, device and batch that a run was timed with, as text."""
    assert run.timing is not None
    return f"{run.timing.machine} ({run.timing.device}), batch {run.timing.batch}"


def marked(runs: Sequence[RunReport]) -> str:
    """Return the first words of a caption on runs whose images had chosen something; none where none had."""
    marks = [run.in_sample.headline for run in runs if run.in_sample]
    if not marks:
        return ""
    if len(runs) == 1:
        return f"{marks[0][0].upper()}{marks[0][1:]}. "
    return "; ".join(f"{short(run.name, 18)} {run.in_sample.headline}" for run in runs if run.in_sample) + ". "


def entitle(axes: Axes, mark: str) -> None:
    """Draw a mark above a figure, which is looked at without its caption, too."""
    if mark:
        axes.set_title("\n".join(textwrap.wrap(mark, 50)), loc="left", fontsize="small", weight="normal")


def _explain(series: Sequence[Series]) -> str:
    parts = ["Solid: every exit alone, numbered"]
    if any(one.budgeted for one in series):
        parts.append("dashed: policies over budgets, chosen on other images")
    if any(one.policy for one in series):
        parts.append("star: the run's policy.json")
    parts.append("bars and bands: 95 % intervals" if any(one.band for one in series) else "bars: 95 % intervals")
    return "; ".join(parts) + "."


def _sources(references: Sequence[Reference]) -> str:
    named = dict.fromkeys(f"{r.label} ({r.source})" for r in references)
    read = " (budgeted ones, dashed, read off figures to about 0.2 points)"
    return ", ".join(named) + (read if any(r.kind == "budgeted" for r in references) else "")


def _draw(
    name: str,
    series: Sequence[Series],
    references: Sequence[Reference],
    label: str,
    spell: Callable[[float], str],
    caption: str,
    mark: str,
) -> Drawing:
    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        entitle(axes, mark)
        for i, reference in enumerate(references):
            _published(axes, reference, i)
        for i, one in enumerate(series):
            _one_run(axes, one, i, numbered_inside=len(series) <= _NUMBERED_INSIDE)
        points = [point for one in series for point in (*one.anytime, *one.budgeted)]
        _cost_axis(axes, [x for x, _ in points] + [x for reference in references for x in reference.macs], spell)
        axes.set(xlabel=label, ylabel="top-1 accuracy (%)")
        axes.margins(x=0.06, y=0.09)
        entries = list(_legend(series, references))
        figure.legend(handles=entries, loc="outside lower center", ncols=2 if len(entries) > 2 else 1, handlelength=2.6)
        if len(series) > _NUMBERED_INSIDE:
            _numbers(axes, series)

    rows = -(-(len(series) + len(references) + 3) // 2) + len(textwrap.wrap(mark, 50))
    alt = f"{caption} " + " ".join(
        f"{one.label}: "
        + ", ".join(f"exit {i} {y:.1f} % at {spell(x)}" for i, (x, y) in enumerate(one.anytime, 1))
        + "."
        for one in series
    )
    return draw(name, paint, caption, alt, height=3.5 + 0.22 * rows)


def _one_run(axes: Axes, one: Series, i: int, numbered_inside: bool) -> None:
    colour, marker, above = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], 3 + i
    if one.budgeted:
        axes.plot(*zip(*one.budgeted, strict=True), color=colour, linestyle=DASHES, zorder=above - 0.2)
        band(axes, [x for x, _ in one.band], [interval for _, interval in one.band], colour)
    bars(axes, [x for x, _ in one.anytime], one.ranges, colour)
    size = 15 if numbered_inside else 7
    axes.plot(*zip(*one.anytime, strict=True), color=colour, marker=marker, markersize=size, zorder=above)
    if numbered_inside:
        for number, point in enumerate(one.anytime, start=1):
            axes.annotate(
                str(number), point, ha="center", va="center_baseline", color=PAPER, weight="bold", zorder=above + 0.3
            )
    if one.policy:
        if one.star:
            cross(axes, one.policy, *one.star, colour, 19 + i)
        axes.plot(*one.policy, **_star(colour), zorder=20 + i)


def _star(colour: str) -> dict[str, Any]:
    return {"marker": "*", "markersize": 17, "color": colour, "markeredgecolor": PAPER, "markeredgewidth": 1.2}


def _published(axes: Axes, reference: Reference, i: int) -> None:
    axes.plot(
        reference.macs,
        reference.top1,
        color=MUTED,
        linewidth=1.1,
        linestyle=DASHES if reference.kind == "budgeted" else "-",
        marker=_REFERENCE_MARKERS[i % len(_REFERENCE_MARKERS)],
        markersize=5.5,
        markerfacecolor=PAPER if reference.kind == "budgeted" else MUTED,
        zorder=2,
    )


def _legend(series: Sequence[Series], references: Sequence[Reference]) -> Iterator[Line2D]:
    from matplotlib.lines import Line2D

    for i, one in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        yield Line2D(
            [], [], color=colour, marker=MARKERS[i % len(MARKERS)], markersize=8, label=drawn(short(one.label, 18))
        )
    if any(one.budgeted for one in series):
        yield Line2D([], [], color=MUTED, linestyle=DASHES, label="budgeted: chosen on\nother images")
    yield Line2D([], [], color=MUTED, linestyle="none", marker="|", markersize=14, label="95 % interval")
    if any(one.policy for one in series):
        yield Line2D([], [], **_star(MUTED) | {"markersize": 14}, linestyle="none", label="policy.json")
    for i, reference in enumerate(references):
        budgeted = reference.kind == "budgeted"
        yield Line2D(
            [],
            [],
            color=MUTED,
            linewidth=1.1,
            linestyle=DASHES if budgeted else "-",
            marker=_REFERENCE_MARKERS[i % len(_REFERENCE_MARKERS)],
            markersize=5.5,
            markerfacecolor=PAPER if budgeted else MUTED,
            label=reference.label,
        )


def _numbers(axes: Axes, series: Sequence[Series]) -> None:
    """Number the exits above their markers, except where a number would cover another run's number or marker."""
    scale = 72 / axes.figure.dpi  # pixels to points
    places = [(axes.transData.transform(one.anytime) * scale).tolist() for one in series]
    markers = [(i, x, y) for i, points in enumerate(places) for x, y in points]
    numbers: list[Point] = []
    for i, one in enumerate(series):
        for number, (point, (x, y)) in enumerate(zip(one.anytime, places[i], strict=True), start=1):
            centre = y + 12
            hidden = any(j != i and abs(x - a) < 8 and abs(centre - b) < 9 for j, a, b in markers)
            if not hidden and all(abs(x - a) > 11 or abs(centre - b) > 13 for a, b in numbers):
                numbers.append((x, centre))
                axes.annotate(
                    str(number),
                    point,
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    weight="bold",
                    zorder=30,
                )


def _cost_axis(axes: Axes, costs: Sequence[float], spell: Callable[[float], str]) -> None:
    """Label costs with units; a wide range, as over several networks, crowds the cheap end of a linear axis."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    wide = max(costs) > 20 * min(costs)
    if wide:
        axes.set_xscale("log")
        decades = max(costs) > 500 * min(costs)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 3.0), numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(lambda value, _: tick_label(spell(value)))


def short(text: str, most: int) -> str:
    """Shorten a name to at most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"
