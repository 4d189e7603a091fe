"""A script of its own process, since any of them may hang: prints versions of torch, torchvision and CUDA, and GPUs.

Its answer is a line of JSON.
"""

from __future__ import annotations

import json
import time
from typing import Any

from adaptive.errors import reason_of


def main() -> None:
    """Print the line."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda_build": torch.version.cuda, "devices": []}
    try:
        import torchvision  # type: ignore[import-untyped]

        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.9]])
        kept = torchvision.ops.nms(boxes, torch.tensor([0.5, 0.9]), 0.5)
        found["torchvision"] = torchvision.__version__
        found["nms"] = kept.tolist()
    except Exception as error:
        found["torchvision_error"] = f"{type(error).__name__}: {reason_of(error, 200)}"
    if torch.version.cuda is not None:
        found |= cuda(torch)
    print(json.dumps(found), flush=True)


def cuda(torch: Any) -> dict[str, Any]:
    """Initialise CUDA and multiply matrices on every GPU; return what each answered."""
    try:
        torch.cuda.init()
    except Exception as error:
        return {"cuda_error": reason_of(error), "devices": []}
    version = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "nccl": version,
        "architectures": torch.cuda.get_arch_list(),
        "devices": [device(torch, i) for i in range(torch.cuda.device_count())],
    }


def device(torch: Any, number: int) -> dict[str, Any]:
    """Return a GPU's name, capability, memory in bytes, and whether a product of matrices on it is right."""
    properties = torch.cuda.get_device_properties(number)
    found: dict[str, Any] = {"name": properties.name, "capability": [properties.major, properties.minor]}
    try:
        found["free"], found["total"] = torch.cuda.mem_get_info(number)
        ones = torch.ones(1024, 1024, device=f"cuda:{number}")
        right = bool((ones @ ones == 1024).all())
        began = time.perf_counter()
        for _ in range(10):
            ones @ ones
        torch.cuda.synchronize(number)
        found["ms"] = 100 * (time.perf_counter() - began)
        found["error"] = "" if right else "a product of matrices is wrong"
    except Exception as error:
        found["error"] = reason_of(error, 200)
    return found


if __name__ == "__main__":
    main()
