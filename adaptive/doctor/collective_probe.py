"""A script of its own process: one rank of a process group that times all_reduce and prints the times as JSON.

``python -m adaptive.doctor.collective_probe BACKEND ADDRESS PORT RANK WORLD DEVICE SECONDS``
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from datetime import timedelta
from typing import Any

from adaptive.errors import reason_of

ELEMENTS = 4 * 2**20  # 16 MiB


def main() -> None:
    """Join the process group, measure, and leave without gloo's destructors, which may abort."""
    backend, address, port, rank, world, number, seconds = sys.argv[1:]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", int(number) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=int(rank),
            world_size=int(world),
            timeout=timedelta(seconds=float(seconds)),
        )
        found: dict[str, Any] = measure(torch, dist, device, int(world))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {reason_of(error)}"}
    print(json.dumps({"met": time.perf_counter() - began, **found}), flush=True)
    os._exit(0)


def measure(torch: Any, dist: Any, device: Any, world: int) -> dict[str, Any]:
    """Return the latency of an all_reduce of one number in seconds, and a large one's bandwidth in bytes per second."""

    def reduce(values: Any) -> float:
        began = time.perf_counter()
        dist.all_reduce(values)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    one = torch.ones(1, device=device)
    reduce(one)
    if one.item() != world:
        return {"error": f"the sum over {world} ranks is {one.item():g}"}
    latency = statistics.median(reduce(one) for _ in range(20))
    many = torch.ones(ELEMENTS, device=device)
    best = min(reduce(many) for _ in range(3))
    return {"latency": latency, "bandwidth": 4 * ELEMENTS / best}


if __name__ == "__main__":
    main()
