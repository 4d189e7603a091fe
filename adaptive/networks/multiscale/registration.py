"""Registers this project's networks with timm as soon as timm is imported, without importing it for that."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NETWORKS = "adaptive.networks.multiscale.timm_entrypoints"


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Lets timm be imported as usual, and the networks right after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Hand out timm's own spec, once, with a loader that goes on to the networks."""
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_both(module: ModuleType) -> None:
            load(module)
            importlib.import_module(NETWORKS)

        spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register the networks with timm: now if it is loaded, else when it is."""
    if "timm" in sys.modules:
        importlib.import_module(NETWORKS)
    else:
        sys.meta_path.insert(0, _AfterTimm())
