"""timm's entry points of this project's networks: ``msdnet``, ``ranet`` and the published configurations.

Their classes are imported when one is built: timm may be loaded, and this module with it, from inside their own import.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn

from adaptive.errors import ModelError, nearest
from adaptive.networks.multiscale.presets import MSDNETS, RANETS

TIMM_ARGUMENTS = ("pretrained_cfg_overlay", "cache_dir")  # of timm.create_model, which reads them itself


def _configuration(stem: str, size: int | None) -> dict[str, Any]:
    size = size or (224 if stem == "imagenet" else 32)
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875 if stem == "imagenet" else 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "blocks.0.stem.scales.0.0.conv" if stem == "imagenet" else "blocks.0.stem.scales.0.conv",
        "classifier": "head.classifier",
    }


def _register(module: str, cls: str, name: str, settings: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, pretrained_cfg: Any = None, **arguments: Any) -> nn.Module:
        given = (arguments.get("pretrained_cfg_overlay") or {}).get("state_dict")  # as a file of weights is loaded
        if pretrained and not given:
            raise ModelError(f"{name}: no pretrained weights are published; leave pretrained out, or give weights")
        size = arguments.pop("img_size", None)  # as timm's transformers are told; any fits here
        merged = {**settings, **arguments}
        configuration = pretrained_cfg or _configuration(merged.get("stem", "cifar"), size)
        network = getattr(importlib.import_module(module), cls)
        _check_settings(network, merged)
        return build_model_with_cfg(network, name, pretrained, pretrained_cfg=configuration, **merged)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{cls} with {settings or 'its defaults'}."
    register_model(entrypoint)


def _check_settings(cls: type[nn.Module], settings: dict[str, Any]) -> None:
    """Refuse what is no setting of a network (raises ModelError with the nearest names)."""
    known = [name for name in inspect.signature(cls).parameters if name != "self"]
    for name in settings:
        if name not in known and name not in TIMM_ARGUMENTS:
            remedy = nearest(name, known, f"known: {', '.join(known)}", most=2)
            raise ModelError(f"{name} is no setting of {cls.__name__}; {remedy}")


for _name, _settings in MSDNETS.items():
    _register("adaptive.networks.multiscale.msdnet", "MSDNet", _name, _settings)
for _name, _settings in RANETS.items():
    _register("adaptive.networks.multiscale.ranet", "RANet", _name, _settings)
