"""Reference numbers measured on the papers' own code: where they lie, and how they were made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaptive import create_model
from adaptive.networks.network import AdaptiveNetwork
from tests.helpers.locations import REFERENCE as FOLDER

RTOL = 1e-8  # in float64

DATASETS = {"cifar10": ("cifar", 10), "cifar100": ("cifar", 100), "ImageNet": ("imagenet", 1000)}
STEP_MODES = {"even": "even", "lin_grow": "lin_grow", "lg": "lin_grow"}


def configurations(file: str, full: tuple[str, ...] = ()) -> list[Any]:
    """Every configuration in a reference file as a test parameter; a skipped one with the reason without the file.

    Those named in ``full`` are left to ``make test-all``.
    """
    path = FOLDER / file
    if not path.is_file():
        reason = f"no {path}: set ADAPTIVE_REFERENCE to the folder of the reference numbers"
        return [pytest.param(None, id="missing", marks=pytest.mark.skip(reason=reason))]
    entries = json.loads(path.read_text())
    return [
        pytest.param(entry, id=name, marks=[pytest.mark.full] * (name in full))
        for name, entry in entries.items()
        if not name.startswith("_")
    ]


def build_msdnet(entry: dict[str, Any], **changes: Any) -> AdaptiveNetwork:
    """Build the MSDNet that an entry of msdnet.json describes."""
    arguments = {**entry["config"], **entry.get("full_args", {})}
    stem, classes = DATASETS[arguments["data"]]
    settings = {
        "num_classes": arguments.get("num_classes", classes),
        "exits": arguments["nBlocks"],
        "stem": stem,
        "base": arguments["base"],
        "step": arguments["step"],
        "step_mode": STEP_MODES[arguments["stepmode"]],
        "channels": arguments["nChannels"],
        "growth": arguments["growthRate"],
        "growth_factors": tuple(arguments.get("grFactor", (1, 2, 4))),
        "bottleneck": arguments.get("bottleneck", True),
        "bottleneck_factors": tuple(arguments.get("bnFactor", (1, 2, 4))),
        "reduction": arguments.get("reduction", 0.5),
        "prune": arguments.get("prune", "max"),
    }
    return create_model("msdnet", **{"collaboration": False, "equilibrium": False, **settings, **changes})


def build_ranet(entry: dict[str, Any], **changes: Any) -> AdaptiveNetwork:
    """Build the RANet that an entry of ranet.json describes."""
    arguments = entry["config"]
    stem, classes = DATASETS[arguments.get("data", "cifar10")]
    numbers = {
        key: tuple(int(part) for part in arguments.get(key, default).split("-"))
        for key, default in (("scale_list", "1-2-3"), ("grFactor", "4-2-1"), ("bnFactor", "4-2-1"))
    }
    settings = {
        "num_classes": classes,
        "stem": stem,
        "blocks": arguments.get("nBlocks", 2),
        "block_step": arguments.get("block_step", 2),
        "step": arguments.get("step", 4),
        "step_mode": STEP_MODES[arguments.get("stepmode", "even")],
        "channels": arguments.get("nChannels", 16),
        "growth": arguments.get("growthRate", 6),
        "scales": numbers["scale_list"],
        "growth_factors": numbers["grFactor"],
        "bottleneck_factors": numbers["bnFactor"],
        "compress": arguments.get("compress_factor", 0.25),
        "reduction": arguments.get("reduction", 0.5),
    }
    return create_model("ranet", **{"collaboration": False, "equilibrium": False, **settings, **changes})


def values(shape: Sequence[int], j: int, kind: str, fill: str) -> Tensor:
    """The values of parameter j, float64."""
    n = torch.arange(math.prod(shape))
    if fill == "quad":
        h = (n * (n + 1) // 2 * 1103 + 7919 * n + 104729 * j + 12345) % 65537
        v = math.sqrt(3) * (2 * h.double() / 65536 - 1)
    else:
        v = torch.sin(0.37 * n.double() + j)
    if len(shape) > 1:
        return (v / math.sqrt(math.prod(shape[1:]))).reshape(tuple(shape))
    return 1 + 0.1 * v if kind == "bn_w" else 0.1 * v


def kind_of(module: nn.Module, name: str) -> str:
    """``bn_w`` for the weight of a BatchNorm, which alone is filled around 1."""
    return "bn_w" if isinstance(module, nn.modules.batchnorm._BatchNorm) and name == "weight" else "other"


@torch.no_grad()
def fill_parameters(modules: Iterable[nn.Module], fill: str, first: int = 0) -> int:
    """Fill the parameters of modules in order from number ``first``; returns the number after the last one."""
    number = first
    for root in modules:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                parameter.copy_(values(parameter.shape, number, kind_of(module, name), fill))
                number += 1
    return number


def reset_statistics(network: nn.Module) -> None:
    """Put every BatchNorm's buffers back to their initial values."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()


def images(size: int) -> Tensor:
    """The reference input (4, 3, size, size)."""
    return torch.cos(0.11 * torch.arange(4 * 3 * size * size, dtype=torch.float64)).reshape(4, 3, size, size)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> float:
    """L2 norm of the concatenated gradient; what has none counts as zero."""
    return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))


def close(actual: Any, expected: Any, rtol: float = RTOL) -> None:
    """Assert that nested numbers agree to a relative tolerance."""
    torch.testing.assert_close(
        torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0
    )


def first_and_norm(logits: Tensor) -> tuple[list[float], float]:
    """The first five classes of sample 0, and the norm over all samples, as the reference holds logits."""
    return logits[0, :5].tolist(), float(logits.norm())
