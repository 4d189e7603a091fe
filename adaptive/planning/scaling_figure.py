"""The figure of ``adaptive plan --simulate``: efficiency and traffic against the number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adaptive.planning.simulation import Scaling, ScalingRow
from adaptive.reporting.drawing import Drawing, draw
from adaptive.reporting.style import COLOURS, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_scaling(scaling: Scaling, rows: Sequence[ScalingRow]) -> Drawing:
    """Draw efficiency and what a rank sends, against the number of ranks."""

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _efficiency(left, scaling, rows)
        _traffic(right, rows)
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks([row.world for row in rows], [str(row.world) for row in rows], rotation=60, fontsize=8)
            axes.minorticks_off()
            axes.set_xlabel("ranks")

    speed = f"{scaling.images_per_second:g} images/s per rank, ZeRO {scaling.settings.stage}"
    caption = f"{scaling.config.model.backbone}: modelled efficiency and traffic ({speed})"
    return draw("scaling", paint, caption, caption, width=9.6, height=4.0)


def _efficiency(axes: Axes, scaling: Scaling, rows: Sequence[ScalingRow]) -> None:
    names = {"fixed": f"global batch {scaling.config.train.global_batch}", "growing": "batch grows with the ranks"}
    for i, (name, label) in enumerate(names.items()):
        points = [(row.world, 100 * share) for row in rows if (share := getattr(row, name)) is not None]
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 5, "label": label}
        axes.plot([world for world, _ in points], [share for _, share in points], **style)
    for share in (80, 50):
        axes.axhline(share, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 105)
    axes.set_ylabel("efficiency, %")
    axes.set_title("of the speed of as many single ranks", fontsize=10)
    axes.legend(loc="lower left")


def _traffic(axes: Axes, rows: Sequence[ScalingRow]) -> None:
    several = [row for row in rows if row.world > 1]
    for stage in range(4):
        sent = [row.sent[stage] / 1e6 for row in several]
        label = f"ZeRO {stage}"
        style: dict[str, Any] = {"color": COLOURS[stage], "marker": MARKERS[stage], "markersize": 5 - 0.5 * stage}
        axes.plot([row.world for row in several], sent, label=label, **style)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("MB sent per rank and step")
    axes.set_title("communication", fontsize=10)
    axes.legend(loc="lower right")
