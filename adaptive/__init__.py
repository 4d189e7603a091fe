"""Adaptive: image classifiers that can stop early."""

from __future__ import annotations

import importlib
from typing import Any

from adaptive.networks.multiscale.registration import register
from adaptive.requirements import missing_package

# Imported on first use: torch and timm take seconds, and `adaptive --help` needs neither.
_HOMES = {
    "AdaptiveNetwork": "adaptive.networks.network",
    "DynamicClassifier": "adaptive.inference.runner",
    "OnnxClassifier": "adaptive.inference.export.onnx_runner",
    "Policy": "adaptive.inference.policy",
    "Seen": "adaptive.inference.drift.seen",
    "calibrate": "adaptive.inference.calibration.calibrate",
    "create_model": "adaptive.networks.create",
    "load": "adaptive.runs",
}
__all__ = sorted(_HOMES)

register()  # `timm.create_model("msdnet_...")` works wherever adaptive is imported


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except ImportError as error:
            raise missing_package(error) or error from None
    raise AttributeError(f"module 'adaptive' has no attribute {name!r}")
