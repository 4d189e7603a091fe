"""The load of a machine: processor, memory, network, and the GPU of this process."""

from __future__ import annotations

import time
from collections.abc import Mapping

import psutil
import torch

from adaptive.distributed.control_group import quota_periods

MIB = 2**20
MOST_SINGLE = 8  # nodes that are recorded one by one; of more, the least, the mean and the most


class MachineLoad:
    """Measures a machine's load since the call before, so that every interval is covered once.

    Args:
        device: of this process.
        whole: also what the processes of a machine have in common; one of them does.
    """

    def __init__(self, device: torch.device, whole: bool) -> None:
        self.device, self.whole = device, whole
        self._sent, self._received, self._since = 0, 0, 0.0
        self._swapped, self._periods = psutil.swap_memory(), quota_periods()
        if whole:
            psutil.cpu_percent()  # the first call has nothing to compare with
            self._traffic()

    def sample(self) -> dict[str, float]:
        """Return ``cpu_percent``, ``memory_percent``, ``sent_mib_s``, ``received_mib_s``; where it swaps
        ``swapped_mib_s``; where there is a CPU quota ``throttled_percent``, the periods in which it was used up; of a
        GPU number n ``gpu<n>_percent``, ``gpu<n>_memory_percent``, ``gpu<n>_watts``, ``gpu<n>_celsius``.
        """
        values = {}
        if self.whole:
            values["cpu_percent"] = psutil.cpu_percent()
            values["memory_percent"] = psutil.virtual_memory().percent
            values |= self._traffic() | self._throttled()
        if self.device.type == "cuda":
            values |= _gpu(self.device)
        return {name: round(value, 2) for name, value in values.items()}

    def _traffic(self) -> dict[str, float]:
        every = psutil.net_io_counters(pernic=True)
        counters = [count for name, count in every.items() if not name.startswith("lo")]
        sent, received = sum(c.bytes_sent for c in counters), sum(c.bytes_recv for c in counters)
        swapped, before = psutil.swap_memory(), self._swapped
        now = time.monotonic()
        seconds = max(now - self._since, 1e-3)
        values = {
            "sent_mib_s": (sent - self._sent) / MIB / seconds,
            "received_mib_s": (received - self._received) / MIB / seconds,
        }
        if moved := swapped.sin - before.sin + swapped.sout - before.sout:
            values["swapped_mib_s"] = moved / MIB / seconds
        self._sent, self._received, self._swapped, self._since = sent, received, swapped, now
        return values

    def _throttled(self) -> dict[str, float]:
        before, self._periods = self._periods, quota_periods()
        if before is None or self._periods is None or (periods := self._periods[0] - before[0]) <= 0:
            return {}
        return {"throttled_percent": 100 * (self._periods[1] - before[1]) / periods}


def _gpu(device: torch.device) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    name = f"gpu{device.index or 0}"
    values = {f"{name}_memory_percent": 100 * (total - free) / total}
    asked = {"percent": torch.cuda.utilization, "celsius": torch.cuda.temperature, "watts": torch.cuda.power_draw}
    for what, ask in asked.items():
        try:
            value = float(ask(device))
        except Exception:  # no NVML, a slice of a GPU, a driver that does not tell: each raises a kind of its own
            continue
        values[f"{name}_{what}"] = value / 1000 if what == "watts" else value
    return values


def system_values(machines: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return record keys ``system/<node>/<measure>``; of more than 8 nodes ``system/all/<measure>_min``, ``_mean``,
    ``_max`` over nodes and GPUs.
    """
    if len(machines) <= MOST_SINGLE:
        return {f"system/{node}/{name}": value for node, own in machines.items() for name, value in own.items()}
    gathered: dict[str, list[float]] = {}
    for own in machines.values():
        for name, value in own.items():
            kind = name.split("_", 1)
            gathered.setdefault(f"gpu_{kind[1]}" if kind[0].startswith("gpu") else name, []).append(value)
    values = {}
    for name, measured in sorted(gathered.items()):
        values[f"system/all/{name}_min"] = min(measured)
        values[f"system/all/{name}_mean"] = round(sum(measured) / len(measured), 2)
        values[f"system/all/{name}_max"] = max(measured)
    return values
