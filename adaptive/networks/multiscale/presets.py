"""The published MSDNets and RANets by name, as settings of their classes."""

from __future__ import annotations

from typing import Any

_IMAGENET_MSDNET = {
    "stem": "imagenet",
    "exits": 5,
    "channels": 32,
    "growth": 16,
    "growth_factors": (1, 2, 4, 4),
}

# Settings by name; what is not given is the class's default. MSDNet: arXiv 1703.09844, section 4 and appendix A, and
# the commands of its PyTorch code; growth 16 and ImageNet: arXiv 1908.06294. RANet: the commands of its code.
MSDNETS: dict[str, dict[str, Any]] = {
    "msdnet": {},
    "msdnet_cifar_anytime": {"exits": 7, "base": 4, "step": 2},
    "msdnet_cifar_anytime_10": {"exits": 10, "base": 4, "step": 2},
    "msdnet_cifar_budgeted": {"exits": 5, "base": 1, "step": 1, "step_mode": "lin_grow"},
    "msdnet_cifar_budgeted_7": {"exits": 7, "base": 1, "step": 1, "step_mode": "lin_grow"},
    "msdnet_cifar_growth16": {"exits": 7, "base": 4, "step": 2, "growth": 16},
    "msdnet_imagenet_step4": {**_IMAGENET_MSDNET, "base": 4, "step": 4},
    "msdnet_imagenet_step5": {**_IMAGENET_MSDNET, "base": 5, "step": 5},
    "msdnet_imagenet_step6": {**_IMAGENET_MSDNET, "base": 6, "step": 6},
    "msdnet_imagenet_step7": {**_IMAGENET_MSDNET, "base": 7, "step": 7},
}
RANETS: dict[str, dict[str, Any]] = {
    "ranet": {},
    "ranet_cifar": {"step": 2, "step_mode": "lin_grow"},
    "ranet_cifar_even": {
        "step": 4,
        "scales": (1, 2, 3, 3),
        "growth_factors": (4, 2, 1, 1),
    },
    "ranet_imagenet": {
        "stem": "imagenet",
        "step": 8,
        "channels": 32,
        "growth": 16,
        "scales": (1, 2, 3, 4),
        "growth_factors": (4, 2, 2, 1),
    },
}


def settings_of(name: str) -> dict[str, Any] | None:
    """Return the settings of a network by its name, or None if it is not one of these networks."""
    return MSDNETS.get(name, RANETS.get(name))
