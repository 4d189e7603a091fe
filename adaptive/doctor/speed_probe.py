"""A script of its own process: multiplies matrices for a second, and prints the operations per second as JSON.

``python -m adaptive.doctor.speed_probe DEVICE``, where DEVICE is cpu, or the number of a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from adaptive.errors import reason_of

SECONDS = 1.0
CPU_SIDE, GPU_SIDE = 384, 4096  # of square matrices
AT_ONCE = 4  # products between two looks at the clock


def main() -> None:
    """Measure, and print the line."""
    for library in ("OMP", "OPENBLAS", "MKL"):  # what one core gets: there are about as many ranks as cores
        os.environ[f"{library}_NUM_THREADS"] = "1"
    try:
        multiply, side = on_gpu(int(sys.argv[1])) if sys.argv[1] != "cpu" else on_cpu()
        found: dict[str, Any] = {"speed": measure(multiply, AT_ONCE * 2.0 * side**3)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {reason_of(error)}"}
    print(json.dumps(found), flush=True)
    os._exit(0)


def on_cpu() -> tuple[Callable[[], None], int]:
    """Return what multiplies on the CPU, by numpy, which starts in a moment; and the matrices' side."""
    import numpy as np

    matrix = np.ones((CPU_SIDE, CPU_SIDE), dtype=np.float32)

    def multiply() -> None:
        for _ in range(AT_ONCE):
            matrix @ matrix

    return multiply, CPU_SIDE


def on_gpu(number: int) -> tuple[Callable[[], None], int]:
    """Return what multiplies on a GPU, and the matrices' side; on the CPU where torch has no use of one."""
    import torch

    if not torch.cuda.is_available():
        return on_cpu()
    device = torch.device("cuda", number % torch.cuda.device_count())
    matrix = torch.ones(GPU_SIDE, GPU_SIDE, device=device)

    def multiply() -> None:
        for _ in range(AT_ONCE):
            matrix @ matrix
        torch.cuda.synchronize(device)

    return multiply, GPU_SIDE


def measure(multiply: Callable[[], None], operations: float, seconds: float = SECONDS) -> float:
    """Return the floating-point operations per second of ``multiply``, which does so many.

    All of the time counts, not the best call: whoever is held back gets fewer done.
    """
    multiply()
    began, rounds = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        multiply()
        rounds += 1
    return rounds * operations / passed


if __name__ == "__main__":
    main()
