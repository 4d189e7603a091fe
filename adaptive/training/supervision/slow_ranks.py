"""Finds the rank that all others wait for: the one whose own time of a step stands out, window by window.

A rank is compared with the median of all ranks (of two, with the faster one). It counts as slow when its own time is
half as much again as the median's, and the difference is a noticeable part of a step, in four windows in a row; or
twice the median's in two, so that what is plain is told soon and noise names nobody. It is told once, and once more
when it has kept up again for two windows.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from adaptive.training.supervision.own_time import PARTS

WINDOW = 10.0  # seconds
LEAST = 10  # steps of every rank in a window
SETTLED = 3  # steps before the first window: libraries start in them
RATIO, AGAIN = 1.5, 1.25  # own time over the median's: from where a rank is slow, and below which it keeps up again
SHARE = 0.05  # of a step's time, which the difference to the median must be
PLAIN = 2.0  # from where a window counts twice
ENOUGH = 4  # of what windows in a row count
DECODES_TOO = 0.25  # of the time lost to data, which computing must lose as well to be the cause of both
NODE_CAUSES = {  # what a node says of itself that explains a slow rank: least value, and the words for it
    "throttled_percent": (5.0, "its CPU quota is used up in {:.0f} % of the periods"),
    "swapped_mib_s": (1.0, "it swaps {:.1f} MiB/s"),
}
CAUSES = {  # what takes the time, where to look
    "compute": "It computes slowly; adaptive doctor, started on all nodes, compares their speed",
    "data": "It waits for its data; look at its disk and network, or raise data.workers",
    "records": "It is slow to write records; look at the file system of train.run_folder",
    "saving": "It waits for a checkpoint to be written; look at the disk of train.run_folder, or save less often",
}

Machines = Mapping[str, Mapping[str, float]]  # of every node what it measured of itself


@dataclass(frozen=True)
class RankSums:
    """What a rank last told: its node, and its own times since it started, as `OwnTime.told` has them."""

    host: str
    sums: Mapping[str, float]


@dataclass(frozen=True)
class Window:
    """A comparison of all ranks over some seconds; times are seconds a step, by part.

    Attributes:
        rank: the slowest.
        host: its node.
        ratio: its own time over the median rank's.
        own: its times.
        median: of all ranks, part by part.
        lines: for the user: ranks that have turned out slow, or keep up again.
    """

    rank: int
    host: str
    ratio: float
    own: Mapping[str, float]
    median: Mapping[str, float]
    lines: tuple[str, ...] = ()

    def record(self, prefix: str = "ranks") -> dict[str, float | str]:
        """Return record keys: the slowest rank, its node and its ratio, and its and the median's seconds a step."""
        values: dict[str, float | str] = {
            f"{prefix}/slowest": self.rank,
            f"{prefix}/slowest_node": self.host,
            f"{prefix}/slowest_ratio": round(self.ratio, 3),
        }
        for name in PARTS:
            if self.own[name] or self.median[name]:
                values[f"{prefix}/slowest_{name}_seconds"] = round(self.own[name], 4)
                values[f"{prefix}/median_{name}_seconds"] = round(self.median[name], 4)
        return values


class SlowRanks:
    """Compares the ranks' own times, and remembers which are slow; lives on rank 0.

    Args:
        world: how many ranks there are.
        step: what is compared, in words.
        seconds: length of a window; longer where it does not hold 10 steps.
    """

    def __init__(self, world: int, step: str = "step", seconds: float = WINDOW) -> None:
        self.world, self.step, self.seconds = world, step, seconds
        self.slow: set[int] = set()
        self._streak: dict[int, int] = {}  # of a rank that is otherwise than it counts as: what windows in a row count
        self._base: dict[int, RankSums] = {}
        self._since = float("-inf")

    def due(self, now: float) -> bool:
        """Whether a window may be over by now (seconds of a monotonic clock)."""
        return now - self._since >= self.seconds

    def look(self, told: Mapping[int, RankSums], machines: Machines, now: float) -> Window | None:
        """Close a window and return what it shows; None where it is not over, or a rank has told nothing yet."""
        if len(told) < self.world or not self.due(now):
            return None
        if not self._base:
            if min(_steps(one.sums) for one in told.values()) >= SETTLED:
                self._base, self._since = dict(told), now
            return None
        steps = {rank: _steps(one.sums) - _steps(self._base[rank].sums) for rank, one in told.items()}
        if min(steps.values()) < LEAST:
            return None
        means = {rank: _mean(one.sums, self._base[rank].sums, steps[rank]) for rank, one in told.items()}
        window = self._compare(means, {rank: one.host for rank, one in told.items()}, machines)
        self._base, self._since = dict(told), now
        return window

    def _compare(
        self,
        means: Mapping[int, Mapping[str, float]],
        hosts: Mapping[int, str],
        machines: Machines,
    ) -> Window:
        own = {rank: sum(mean[name] for name in PARTS) for rank, mean in means.items()}
        usual = max(statistics.median_low(own.values()), 1e-6)
        parts = {name: statistics.median_low(mean[name] for mean in means.values()) for name in PARTS}
        turned: list[int] = []
        recovered: list[int] = []
        for rank, seconds in own.items():
            noticeable = seconds - usual >= SHARE * means[rank]["seconds"]
            slow = noticeable and seconds >= (AGAIN if rank in self.slow else RATIO) * usual
            if slow == (rank in self.slow):
                self._streak.pop(rank, None)
                continue
            plain = not slow or seconds >= PLAIN * usual
            self._streak[rank] = self._streak.get(rank, 0) + (2 if plain else 1)
            if self._streak[rank] >= ENOUGH:
                del self._streak[rank]
                (turned if slow else recovered).append(rank)
        self.slow = self.slow.union(turned).difference(recovered)
        lines = []
        for host in dict.fromkeys(hosts[rank] for rank in turned):
            here = [rank for rank in turned if hosts[rank] == host]
            rank = max(here, key=own.__getitem__)
            ratio = own[rank] / usual
            lines.append(self._slow_line(rank, host, len(here), ratio, means[rank], parts, machines.get(host, {})))
        for host in dict.fromkeys(hosts[rank] for rank in recovered):
            here = [rank for rank in recovered if hosts[rank] == host]
            ratio = max(own[rank] for rank in here) / usual
            lines.append(f"{_named(here[0], host, len(here))} keeps up again: {ratio:.1f} x the median rank's own time")
        slowest = max(own, key=own.__getitem__)
        return Window(slowest, hosts[slowest], own[slowest] / usual, means[slowest], parts, tuple(lines))

    def _slow_line(
        self,
        rank: int,
        host: str,
        count: int,
        ratio: float,
        own: Mapping[str, float],
        median: Mapping[str, float],
        machine: Mapping[str, float],
    ) -> str:
        beyond = {name: own[name] - median[name] for name in PARTS}
        cause = max(PARTS, key=beyond.__getitem__)
        computes_slowly = own["compute"] >= RATIO * median["compute"]
        if cause == "data" and computes_slowly and beyond["compute"] >= DECODES_TOO * beyond["data"]:
            cause = "compute"  # what computes slowly decodes slowly too
        times = f"{cause} {own[cause]:.3f} s a {self.step}, the median rank's is {median[cause]:.3f} s"
        told = [
            words.format(machine[key]) for key, (least, words) in NODE_CAUSES.items() if machine.get(key, 0) >= least
        ]
        node = f" Of {host} is known: {', '.join(told)}." if told else ""
        return (
            f"warning: {_named(rank, host, count)} is slow, and all ranks wait for it: {ratio:.1f} x the median rank's "
            f"own time ({times}).{node} {CAUSES[cause]}"
        )


def _named(rank: int, host: str, count: int) -> str:
    return f"rank {rank} on {host}" + (f" (and {count - 1} more there)" if count > 1 else "")


def _steps(sums: Mapping[str, float]) -> float:
    return sums.get("steps", 0.0)


def _mean(now: Mapping[str, float], before: Mapping[str, float], steps: float) -> dict[str, float]:
    return {name: (now.get(name, 0.0) - before.get(name, 0.0)) / steps for name in ("seconds", *PARTS)}
