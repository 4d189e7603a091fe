"""How sure a report's numbers are: intervals of a run's exits and of its policy, from its answers."""

from __future__ import annotations

from typing import Any

from adaptive.inference.intervals import Interval, compared, mean_cost, wilson
from adaptive.reporting.report_data import RunReport


def exit_range(run: RunReport, number: int) -> Interval:
    """Interval of the accuracy of an exit, from 1, in percent."""
    return wilson(int((run.answers[number - 1] == run.labels).sum()), run.images)


def exit_intervals(run: RunReport, number: int) -> dict[str, Any]:
    """What the images say of an exit, from 1, beside the last one, as `compared`."""
    return compared(run.answers[number - 1] == run.labels, run.answers[-1] == run.labels)


def full_range(run: RunReport) -> Interval:
    """Interval of the accuracy of the last exit, in percent."""
    return exit_range(run, len(run.answers))


def policy_range(run: RunReport) -> Interval:
    """Interval of the accuracy by the policy in percent; needs a policy."""
    return wilson(int(run.right.sum()), run.images)


def policy_intervals(run: RunReport) -> dict[str, Any]:
    """What the images say of the policy: as `compared`, and ``macs_interval``; needs a policy."""
    counts = [round(share * run.images) for share in run.shares]
    found = compared(run.right, run.answers[-1] == run.labels)
    return {**found, "macs_interval": list(mean_cost(counts, run.macs))}
