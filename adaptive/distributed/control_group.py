"""What this process's control group, a container's or a job's, allows it: memory, cores, processes."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def memory_limit() -> tuple[int | None, int]:
    """Return the memory limit and use in bytes of this process's control group, version 2 or 1."""
    limit, used, _ = _memory()
    return limit, used


def available_memory() -> int:
    """Return the bytes of memory that this process may still take: of the machine, and of its control group."""
    free = int(psutil.virtual_memory().available)
    limit, used, cached = _memory()
    return free if limit is None else max(0, min(free, limit - used + cached))


def cpu_quota() -> float | None:
    """Return how many cores' time the control group grants."""
    for folder in (_own_group(""), CGROUP):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            return int(words[0]) / int(words[1])
    for folder in (_own_group("cpu"), CGROUP / "cpu"):
        quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit():
            return int(quota) / int(period)
    return None


def quota_periods() -> tuple[int, int] | None:
    """Return over how many periods the quota of cores' time was granted so far, and in how many it was used up."""
    for folder in (_own_group(""), CGROUP, _own_group("cpu"), CGROUP / "cpu"):
        counts = dict(line.split() for line in _read(folder / "cpu.stat").splitlines() if len(line.split()) == 2)
        if int(counts.get("nr_periods", 0)):
            return int(counts["nr_periods"]), int(counts.get("nr_throttled", 0))
    return None


def process_limit() -> int | None:
    """Return how many processes and threads the control group allows."""
    text = _read(CGROUP / "pids.max") or _read(_own_group("pids") / "pids.max")
    return int(text) if text.isdigit() else None


def _memory() -> tuple[int | None, int, int]:
    """Return limit and use in bytes, and how much of the use is files that the kernel drops when memory is wanted."""
    for folder, limit, used in (
        (_own_group(""), "memory.max", "memory.current"),
        (CGROUP, "memory.max", "memory.current"),
        (_own_group("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if (text := _read(folder / limit)).isdigit():
            rows = [line.split() for line in _read(folder / "memory.stat").splitlines()]
            counts = {row[0].removeprefix("total_"): int(row[1]) for row in rows if len(row) == 2}
            return int(text), int(_read(folder / used) or 0), counts.get("inactive_file", 0)
    return None, 0, 0


def _own_group(controller: str) -> Path:
    """Return the folder of this process's control group; an empty controller asks for version 2."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return CGROUP / controller / path.lstrip("/")
    return CGROUP / controller


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
