"""Communication that nothing hides: the time in which a collective runs and no computation does, from a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Interval = tuple[float, float]


def exposed_share(events: Iterable[Mapping[str, Any]], device: str) -> dict[str, float]:
    """Return the shares of the traced time in which collectives ran, and in which they ran with nothing beside them.

    Args:
        events: ``traceEvents`` of a trace of torch.profiler, times in microseconds.
        device: on ``cuda`` kernels count, on ``cpu`` operators and gloo's work.
    """
    collectives, work, all_of_it = [], [], []
    for event in events:
        if event.get("ph") != "X":
            continue
        interval = (float(event["ts"]), float(event["ts"]) + float(event["dur"]))
        kind, name = str(event.get("cat", "")), str(event.get("name", "")).lower()
        if name.startswith("gloo:") or (kind == "kernel" and name.startswith("nccl")):
            collectives.append(interval)
        elif kind == ("kernel" if device == "cuda" else "cpu_op") and not name.startswith(("c10d::", "record_param")):
            work.append(interval)
        if kind in ("kernel", "cpu_op") or name.startswith("gloo:"):
            all_of_it.append(interval)
    if not all_of_it:
        return {"collectives": 0.0, "exposed": 0.0}
    span = max(end for _, end in all_of_it) - min(start for start, _ in all_of_it)
    busy, communicating = union(work), union(collectives)
    return {
        "collectives": total(communicating) / span,
        "exposed": (total(communicating) - total(overlap(communicating, busy))) / span,
    }


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Join intervals that touch; the result is sorted."""
    joined: list[Interval] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def overlap(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """Return what two sorted lists of separate intervals have in common."""
    found, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            found.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return found


def total(intervals: Iterable[Interval]) -> float:
    """Return the length of separate intervals."""
    return sum(end - start for start, end in intervals)
