"""The report's files: one self-contained HTML page, and every figure as a PNG."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaptive.errors import MachineError
from adaptive.files import json_text, write_atomically
from adaptive.foreign_text import visible
from adaptive.inference.in_sample import REMEDY
from adaptive.inference.intervals import LEVEL
from adaptive.reporting import exit_figures as figures
from adaptive.reporting.accuracy_curves import against_macs, where
from adaptive.reporting.class_statistics import class_shares, confused_pairs
from adaptive.reporting.drawing import Drawing
from adaptive.reporting.image_wall import Tile, draw_wall, thumbnail
from adaptive.reporting.milliseconds_figures import APART, milliseconds_figures, timed_apart
from adaptive.reporting.published import REFERENCES, TITLES
from adaptive.reporting.report_data import RunReport, Timing
from adaptive.reporting.run_intervals import exit_intervals, full_range, policy_intervals
from adaptive.reporting.tables import human, percent_range

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class ExitRow:
    """An exit's row in a run's table, with the figures and images of that exit."""

    number: int
    after: str
    macs: int
    share_of_cost: float
    milliseconds: float | None
    parameters: int
    top1: float
    top1_interval: Sequence[float]
    top1_loss: float
    top1_loss_interval: Sequence[float]
    top5: float
    leave: float | None
    leave_count: int | None
    leave_top1: float | None
    confusion: Drawing | None
    pairs: list[tuple[str, str, int]]
    calibration: Drawing
    tiles: list[tuple[Tile, str]]


@dataclass(frozen=True)
class RunSection:
    """The page's section about a single run."""

    run: RunReport
    exits: list[ExitRow]
    classes: Drawing | None


@dataclass
class ReportFiles:
    """The files of a report: the page, the PNG files by the figure's name, and each run's image wall."""

    page: Path
    figures: dict[str, Path] = field(default_factory=dict)
    walls: dict[str, Path] = field(default_factory=dict)


def write_report(
    runs: Sequence[RunReport],
    page: str | Path,
    folder: str | Path,
    walls: Mapping[int, Sequence[Tile]] | None = None,
    published: str | None = None,
) -> ReportFiles:
    """Write the page and its figures.

    Args:
        runs: one or several, of any networks and splits.
        page: the HTML file.
        folder: of the PNG files; made if needed.
        walls: images of runs, by index in ``runs``, as `image_wall.tiles` gives them.
        published: the data set whose published numbers are shown (`published.choose`), or none.

    Raises:
        MachineError: a file cannot be written.
    """
    page, folder, walls = Path(page), Path(folder), walls or {}
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shared = {
        "macs": against_macs(runs, published),
        "shares": figures.shares(runs),
        "leavers": figures.leavers(runs),
    }
    milliseconds = milliseconds_figures(runs)
    sections = [_section(run, runs, walls.get(i, ())) for i, run in enumerate(runs)]
    html = _render(runs, sections, shared, milliseconds, published)
    with _writing(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page, html)
    written = ReportFiles(page)
    for drawing in (*milliseconds, *_drawings(shared, sections)):
        path = folder / f"{drawing.name}.png"
        with _writing(path):
            write_atomically(path, drawing.png)
        written.figures[drawing.name] = path
    for i, tiles in walls.items():
        if tiles:
            path = folder / f"{figures.stem(runs[i], runs, 'wall')}.png"
            written.walls[runs[i].name] = draw_wall(runs[i], tiles, path)
    return written


def report_data(runs: Sequence[RunReport], published: str | None) -> dict[str, Any]:
    """The numbers behind the figures, as plain JSON types; costs in multiply-adds, accuracies in percent."""
    return {
        "timed_apart": timed_apart(runs),
        "runs": [_run_data(run) for run in runs],
        "published": [
            {"label": r.label, "kind": r.kind, "macs": r.macs, "top1": r.top1, "source": r.source}
            for r in (REFERENCES[published] if published else ())
        ],
    }


def _run_data(run: RunReport) -> dict[str, Any]:
    timing = run.timing
    data: dict[str, Any] = {
        "name": run.name,
        "backbone": run.backbone,
        "checkpoint": run.checkpoint,
        "dataset": run.dataset,
        "split": run.split,
        "images": run.images,
        "in_sample": bool(run.in_sample),
        "chose": run.in_sample.chose,
        "level": LEVEL,
        "exits": [
            {
                "exit": i + 1,
                "after": run.exit_names[i],
                "macs": run.macs[i],
                "milliseconds": timing.milliseconds[i] if timing else None,
                "parameters": run.parameters[i],
                "top1": run.top1[i],
                **exit_intervals(run, i + 1),
                "top5": run.top5[i],
                "loss": run.loss[i],
            }
            for i in range(len(run.macs))
        ],
        "timing": _timing_data(timing) if timing else None,
        "budgeted": [{"macs": p.cost, "top1": p.top1, "shares": p.shares, **p.intervals} for p in run.budgeted],
        "policy": None,
    }
    if run.policy:
        data["policy"] = {
            "kind": run.policy.kind,
            "top1": run.policy_top1,
            "macs": run.policy_macs,
            **policy_intervals(run),
            "shares": run.shares,
            "top1_of_those_that_leave": [run.accuracy_at(n) for n in range(1, len(run.macs) + 1)],
            "classes": [
                {"class": name, "shares": None if math.isnan(row[0]) else row.tolist()}
                for name, row in zip(run.classes, class_shares(run), strict=True)
            ],
        }
    return data


def _timing_data(timing: Timing) -> dict[str, Any]:
    where = {"machine": timing.machine, "device": timing.device, "batch": timing.batch}
    return {**where, "together": timing.together}


def _section(run: RunReport, runs: Sequence[RunReport], tiles: Sequence[Tile]) -> RunSection:
    k = len(run.macs)
    return RunSection(
        run=run,
        exits=[_exit(run, runs, n, [tile for tile in tiles if tile.exit == n]) for n in range(1, k + 1)],
        classes=figures.classes(run, figures.stem(run, runs, "classes")) if run.policy else None,
    )


def _exit(run: RunReport, runs: Sequence[RunReport], n: int, tiles: Sequence[Tile]) -> ExitRow:
    has = run.policy is not None
    many = len(run.classes) > figures.FEW_CLASSES
    return ExitRow(
        number=n,
        after=run.exit_names[n - 1],
        macs=run.macs[n - 1],
        share_of_cost=run.macs[n - 1] / run.macs[-1],
        milliseconds=run.timing.milliseconds[n - 1] if run.timing else None,
        parameters=run.parameters[n - 1],
        top1=run.top1[n - 1],
        **exit_intervals(run, n),
        top5=run.top5[n - 1],
        leave=run.shares[n - 1] if has else None,
        leave_count=len(run.left_at(n)) if has else None,
        leave_top1=run.accuracy_at(n) if has else None,
        confusion=figures.confusions(run, n, figures.stem(run, runs, f"confusion_exit{n}")) if has else None,
        pairs=confused_pairs(run, n) if has and many else [],
        calibration=figures.calibration(run, n, figures.stem(run, runs, f"calibration_exit{n}")),
        tiles=[(tile, thumbnail(tile.image)) for tile in tiles],
    )


def _drawings(shared: Mapping[str, Drawing | None], sections: Sequence[RunSection]) -> Iterator[Drawing]:
    yield from (drawing for drawing in shared.values() if drawing)
    for section in sections:
        if section.classes:
            yield section.classes
        for one in section.exits:
            yield one.calibration
            if one.confusion:
                yield one.confusion


def _render(
    runs: Sequence[RunReport],
    sections: Sequence[RunSection],
    shared: Mapping[str, Drawing | None],
    milliseconds: Sequence[Drawing],
    published: str | None,
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("adaptive.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # not what is HTML already
    )
    environment.filters["human"] = human
    environment.filters["where"] = where
    environment.filters["range"] = percent_range
    environment.filters["intervals"] = policy_intervals
    environment.filters["full_range"] = full_range
    # Only "<" could end a script element; JSON may hold it as an escape.
    data = json_text(report_data(runs, published), indent=1, ascii_only=False).replace("<", "\\u003c")
    return environment.get_template(TEMPLATE).render(
        runs=runs,
        sections=sections,
        shared=shared,
        milliseconds=milliseconds,
        apart=f"{APART} To time them together:" if timed_apart(runs) else "",
        published=TITLES[published] if published else "",
        references=REFERENCES[published] if published else (),
        data=data,
        remedy=REMEDY,
        small=max((tile.image.width for s in sections for e in s.exits for tile, _ in e.tiles), default=99) <= 16,
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise MachineError(f"cannot write {path}: {reason}; choose another place with --out") from None
