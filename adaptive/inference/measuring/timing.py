"""Times: of one call on a device, and their median and quartiles over several rounds."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise one value per round; a single one is all three."""
        several = values if len(values) > 1 else [*values, *values]
        q1, median, q3 = statistics.quantiles(several, n=4, method="inclusive")
        return cls(median, q1, q3)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Summarise the ratios of values that were measured in the same rounds."""
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])

    def scaled(self, factor: float) -> Spread:
        """The same in another unit (factor above 0)."""
        return Spread(self.median * factor, self.q1 * factor, self.q3 * factor)


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that a call takes."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


def apart(first: Sequence[float], second: Sequence[float]) -> float:
    """How far the medians of two series of times are apart, as a share of the smaller one."""
    medians = statistics.median(first), statistics.median(second)
    return max(medians) / min(medians) - 1
