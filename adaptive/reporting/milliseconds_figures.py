"""Figures of accuracy against milliseconds: on one axis only what was timed together."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive.reporting.accuracy_curves import against_milliseconds
from adaptive.reporting.drawing import Drawing
from adaptive.reporting.exit_figures import stem
from adaptive.reporting.report_data import RunReport

APART = "The runs were timed apart, so their milliseconds do not compare and share no axis."


def timed_apart(runs: Sequence[RunReport]) -> bool:
    """Say whether times of several runs are separate measurements: another machine, device or moment."""
    timed = [run.timing for run in runs if run.timing]
    together = all(timing.together for timing in timed) and len({(t.machine, t.device, t.batch) for t in timed}) == 1
    return len(timed) > 1 and not together


def milliseconds_figures(runs: Sequence[RunReport]) -> list[Drawing]:
    """Draw accuracy against milliseconds: of runs that were timed together on one axis, else of each by itself."""
    if not timed_apart(runs):
        found = [against_milliseconds(runs)]
    else:
        found = [
            against_milliseconds([run], stem(run, runs, "accuracy_ms"), f"{run.name}, timed apart from the others. ")
            for run in runs
        ]
    return [drawing for drawing in found if drawing]
