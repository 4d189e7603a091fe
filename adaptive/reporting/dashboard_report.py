"""The report on a run's dashboard in W&B: tables of exits and of images, a chart, and every figure."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive.reporting.image_wall import Tile
from adaptive.reporting.report_data import RunReport
from adaptive.reporting.run_intervals import exit_range
from adaptive.tracking.dashboard import Dashboard

EXIT_COLUMNS = ["exit", "after", "top-1 %", "top-5 %", "MACs", "ms", "parameters", "leave here", "of them right %"]
EXIT_COLUMNS += ["top-1 from (95 %)", "to (95 %)"]
WALL_COLUMNS = ["image", "true class", "answer", "confidence", "exit", "right", "number in the split"]


def show(dashboard: Dashboard, run: RunReport, tiles: Sequence[Tile], figures: Mapping[str, str | Path]) -> None:
    """Send a run's report and end the dashboard; ``figures`` are PNG files by name. Keys begin with ``report/``."""
    dashboard.table("report/exits", EXIT_COLUMNS, exit_rows(run))
    dashboard.lines(
        "report/accuracy_against_macs", accuracy_lines(run), "accuracy against MACs", "multiply-adds per image"
    )
    for name, path in figures.items():
        dashboard.image(f"report/{name}", path)
    # The client has read the files when the dashboard has finished.
    with tempfile.TemporaryDirectory() as folder:
        if tiles:
            dashboard.table("report/images", WALL_COLUMNS, _wall_rows(tiles, Path(folder)))
        dashboard.finish()


def _wall_rows(tiles: Sequence[Tile], folder: Path) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for i, tile in enumerate(tiles):
        path = folder / f"{i}.png"
        tile.image.save(path)
        rows.append([{"image": path}, tile.label, tile.answer, tile.confidence, tile.exit, tile.right, tile.id])
    return rows


def exit_rows(run: RunReport) -> list[list[Any]]:
    """One row per exit, in the order of ``EXIT_COLUMNS``; None where nothing is known."""
    times: Sequence[float | None] = run.timing.milliseconds if run.timing else [None] * len(run.macs)
    return [
        [
            i + 1,
            run.exit_names[i],
            run.top1[i],
            run.top5[i],
            run.macs[i],
            times[i],
            run.parameters[i],
            run.shares[i] if run.policy else None,
            run.accuracy_at(i + 1) if run.policy else None,
            *exit_range(run, i + 1),
        ]
        for i in range(len(run.macs))
    ]


def accuracy_lines(run: RunReport) -> dict[str, list[tuple[float, float]]]:
    """Lines of (multiply-adds, top-1 in percent): of the exits, of the budgeted curve, of the policy alone."""
    lines: dict[str, list[tuple[float, float]]] = {"exits": list(zip(run.macs, run.top1, strict=True))}
    if run.budgeted:
        lines["budgeted"] = [(p.cost, p.top1) for p in run.budgeted]
    if run.policy:
        lines["policy"] = [(run.policy_macs, run.policy_top1)]
    return lines
