"""A script: one of several processes that meet and reduce, as training does; prints what it took as JSON.

``collective_probe.py BACKEND ADDRESS PORT RANK WORLD DEVICE SECONDS``
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
    """Meet, reduce, and leave without gloo's destructors, which may abort."""
    backend, address, port, rank, world, device, seconds = sys.argv[1:]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    began = time.perf_counter()
    try:
        place = torch.device("cpu")
        if backend == "nccl":
            place = torch.device("cuda", int(device) % torch.cuda.device_count())
            torch.cuda.set_device(place)
        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}:{port}",
            rank=int(rank),
            world_size=int(world),
            timeout=timedelta(seconds=float(seconds)),
        )
        found: dict[str, Any] = measure(torch, dist, place, int(world))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {reason_of(error)}"}
    print(json.dumps({"met": time.perf_counter() - began, **found}), flush=True)
    os._exit(0)


def measure(torch: Any, dist: Any, place: Any, world: int) -> dict[str, Any]:
    """Latency of a small reduction in seconds, bandwidth of a large one in bytes per second."""

    def reduce(values: Any) -> float:
        began = time.perf_counter()
        dist.all_reduce(values)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        return time.perf_counter() - began

    one = torch.ones(1, device=place)
    reduce(one)
    if one.item() != world:
        return {"error": f"the sum over {world} ranks is {one.item():g}"}
    latency = statistics.median(reduce(one) for _ in range(20))
    many = torch.ones(ELEMENTS, device=place)
    best = min(reduce(many) for _ in range(3))
    return {"latency": latency, "bandwidth": 4 * ELEMENTS / best}


if __name__ == "__main__":
    main()
