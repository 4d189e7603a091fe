"""A script of its own process: multiplies matrices for a second, and prints the operations per second as JSON.

``python -m adaptive.doctor.speed_probe DEVICE``, where DEVICE is cpu, or the number of a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from adaptive.errors import reason_of

SECONDS = 1.0
SIDE = {"cpu": 384, "cuda": 4096}


def main() -> None:
    """Measure, and print the line."""
    import torch

    torch.set_num_threads(1)  # as many ranks as cores, each on its own: what a rank gets, not what the node could do
    try:
        device = torch.device("cpu")
        if sys.argv[1] != "cpu" and torch.cuda.is_available():
            device = torch.device("cuda", int(sys.argv[1]) % torch.cuda.device_count())
        found: dict[str, Any] = {"speed": measure(torch, device)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {reason_of(error)}"}
    print(json.dumps(found), flush=True)
    os._exit(0)


def measure(torch: Any, device: Any, seconds: float = SECONDS) -> float:
    """Return the floating-point operations per second of products of matrices.

    All of the time counts, not the best product: whoever is held back gets fewer done.
    """
    side = SIDE[device.type]
    matrix = torch.ones(side, side, device=device)

    def multiply() -> None:
        for _ in range(4):
            matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    multiply()
    began, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        multiply()
        rounds += 1
    return rounds * 4 * 2 * side**3 / passed


if __name__ == "__main__":
    main()
