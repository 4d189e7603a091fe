"""``adaptive policy check RUN --seen FILE``: whether images in use are still like those of the calibration."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from adaptive.commands.run_options import prepare_tables
from adaptive.foreign_text import say, shell_words

if TYPE_CHECKING:
    from adaptive.inference.drift.comparison import Comparison
    from adaptive.inference.drift.counts import Counts
    from adaptive.inference.policy import Policy

ACTIONS = ("check",)
EXIT_CODES = {"alike": 0, "drifted": 3, "too few": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.epilog = (
        "Ends with 0 where the images are alike, 3 where they are no longer, 4 where they are too few to tell, and 1 "
        "where nothing can be compared."
    )
    parser.add_argument("action", choices=ACTIONS, help="check: compare what was seen with the calibration's images")
    parser.add_argument("model", metavar="RUN", help="run folder, folder that `adaptive export` wrote, or policy file")
    parser.add_argument(
        "--seen",
        metavar="FILE",
        action="append",
        required=True,
        help="counts that `adaptive predict --seen FILE` or a runner kept; may be given several times, for their sum",
    )
    parser.add_argument(
        "--false-alarms",
        type=float,
        default=0.01,
        metavar="P",
        help="how often images that are alike may be called otherwise (default 0.01)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command; the exit code is that of the verdict."""
    from functools import reduce
    from operator import add

    from adaptive.errors import PolicyError
    from adaptive.files import json_text
    from adaptive.inference.drift.comparison import compare
    from adaptive.inference.drift.seen import Seen

    prepare_tables(arguments)
    if not 0 < arguments.false_alarms < 1:
        raise PolicyError(f"--false-alarms {arguments.false_alarms:g}: give a probability between 0 and 1")
    policy, where = _policy(arguments.model)
    then = policy.calibration.seen if policy.calibration else None
    if then is None:
        raise PolicyError(
            f"{where} remembers no images of a calibration: it is of an earlier version, or its thresholds were given "
            "by hand; calibrate again: adaptive calibrate RUN --budget 0.5"
        )
    parts = []
    for file in arguments.seen:
        parts.append(Seen.load(file))
        parts[-1].check(policy, file, where)
    now = reduce(add, parts).counts
    found = compare(then, now, arguments.false_alarms)
    if arguments.json:
        print(json_text(_result(arguments, then, now, found)))
    else:
        _print(arguments, then, now, found)
    return EXIT_CODES[found.verdict]


def _policy(model: str) -> tuple[Policy, str]:
    """Read a run's policy, an export's, or a file's, and say where it lies (raises PolicyError, ExportError)."""
    from pathlib import Path

    from adaptive.inference.export.export_manifest import MANIFEST, Manifest
    from adaptive.inference.policy import Policy

    path = Path(model)
    if (path / MANIFEST).is_file():
        return Manifest.read(path).policy, str(path)
    file = path / "policy.json" if path.is_dir() else path
    return Policy.load(file), str(file)


def _result(arguments: argparse.Namespace, then: Counts, now: Counts, found: Comparison) -> dict[str, Any]:
    from adaptive.inference.intervals import LEVEL

    return {
        "policy": arguments.model,
        "seen": arguments.seen,
        "verdict": found.verdict,
        "p_value": found.p_value,
        "false_alarms": arguments.false_alarms,
        "statistic": found.statistic,
        "cells": found.cells,
        "visible": found.visible,
        "enough": found.enough,
        "then": _side(then),
        "now": _side(now),
        "level": LEVEL,
    }


def _side(counts: Counts) -> dict[str, Any]:
    images = counts.images
    return {
        "images": images,
        "counts": counts.leaving,
        "shares": [count / images if images else None for count in counts.leaving],
        "share_intervals": [_interval(count, images) for count in counts.leaving],
    }


def _interval(count: int, images: int) -> tuple[float, float] | None:
    """Return Wilson's interval of a share."""
    from adaptive.inference.intervals import wilson

    if not images:
        return None
    low, high = wilson(count, images)
    return low / 100, high / 100


def _print(arguments: argparse.Namespace, then: Counts, now: Counts, found: Comparison) -> None:
    from rich.table import Table

    from adaptive.reporting.tables import print_table

    table = Table(title="where images leave", title_justify="left")
    for name in ("exit", f"{then.images:,} of the calibration", "95 %", f"{now.images:,} seen since", "95 %"):
        table.add_column(name, justify="right")
    for i, counts in enumerate(zip(then.leaving, now.leaving, strict=True)):
        sides = [_share(count, images) for count, images in zip(counts, (then.images, now.images), strict=True)]
        table.add_row(str(i + 1), *sides[0], *sides[1])
    print_table(table)
    print(
        f"chi-square {found.statistic:.4g} of {found.cells} cells of exit and confidence: p = {found.p_value:.3g}, an "
        f"alarm at {arguments.false_alarms:g} or less, which images that are alike give as often"
    )
    say(_sentence(arguments, then, found))


def _share(count: int, images: int) -> tuple[str, str]:
    interval = _interval(count, images)
    if interval is None:
        return "", ""
    return f"{100 * count / images:.1f} %", f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def _sentence(arguments: argparse.Namespace, then: Counts, found: Comparison) -> str:
    if found.verdict == "alike":
        return (
            "alike: the images leave as those of the calibration did; a change in "
            f"{100 * (found.visible or 0):.0f} % of them would have shown, nine times in ten"
        )
    if found.verdict == "drifted":
        model = shell_words(arguments.model)
        return (
            "no longer alike: what the calibration promised does not hold for these images; calibrate again on images "
            f"like them, packed with their labels: adaptive calibrate {model} --data FOLDER --budget 0.5"
        )
    if found.enough is None:
        return (
            f"too few images to tell, however many are seen: the calibration had {then.images:,}; calibrate on more "
            "(adaptive pack --hold-out N)"
        )
    return f"too few images to tell: {found.enough:,} would show a change in a quarter of them, nine times in ten"
