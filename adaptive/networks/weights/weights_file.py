"""Reads a file of somebody's weights: the tensors of one network, whatever they are wrapped in, and its header."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adaptive.errors import ModelError, reason_of, told_refusals

SAFETENSORS = ".safetensors"
EXIT = re.compile(r"(^|\.)exits\.\d+\.")  # in names of an AdaptiveNetwork, whose whole state is no timm model's


@dataclass(frozen=True)
class WeightsFile:
    """A network's tensors by the names that its model has, and the names of what else the file held."""

    path: Path
    state: dict[str, Tensor]
    left_out: tuple[str, ...] = ()


def read_weights(path: Path, known: Collection[str]) -> WeightsFile:
    """Read a .safetensors file, or one of torch.save that holds tensors and plain values only.

    What training loops wrap weights in is taken off: the entry of a dictionary (``state_dict``, DeepSpeed's ``module``
    ...), and prefixes of names (``module.`` of DDP, ``_orig_mod.`` of torch.compile, ``model.`` of Lightning ...). Of
    several copies an average of the weights is taken, as timm does.

    Args:
        path: of the file.
        known: names of the model's tensors.

    Raises:
        ModelError: the file is missing, cannot be read, or holds a whole network of this project.
    """
    if path.is_dir():
        raise ModelError(
            f"weights = {str(path)!r} is a folder; give a .safetensors or .pth file, or begin from a run's whole "
            f"network with model.from_run={path}"
        )
    if not path.is_file():
        raise ModelError(f"weights = {str(path)!r}: no such file; give a .safetensors or .pth file of timm weights")
    with told_refusals(ModelError):
        path.open("rb").close()
    try:
        found = timm.models.load_state_dict(str(path), weights_only=True)
        tensors = dict(_flat(found))
    except Exception as error:  # the readers of the two formats raise whatever they like
        reason = reason_of(error, 200).partition(" No automatic unsafe")[0]
        raise ModelError(
            f"weights = {str(path)!r}: cannot be read as tensors only: {reason}; save them alone where they come from: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if any(map(EXIT.search, tensors)) and not any(map(EXIT.search, known)):
        raise ModelError(
            f"weights = {str(path)!r} holds a whole network with its exits; begin from its run with "
            "model.from_run=RUN, or write the backbone alone: adaptive checkpoint RUN --export FILE"
        )
    prefix = _prefix(tensors, known)
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    if not state:
        raise ModelError(f"weights = {str(path)!r} holds no tensors; give a file of timm weights")
    return WeightsFile(path, state, tuple(key for key in tensors if not key.startswith(prefix)))


def read_header(path: Path) -> dict[str, Any]:
    """Return what the header of a .safetensors file says, JSON where it is some; empty for other files."""
    if path.suffix != SAFETENSORS or not path.is_file():
        return {}
    try:
        with safe_open(path, "pt") as opened:
            texts = opened.metadata() or {}
    except (SafetensorError, OSError):
        return {}  # reading the tensors will say so
    return {key: _value(text) for key, text in texts.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries by dotted names."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _prefix(tensors: Collection[str], known: Collection[str]) -> str:
    """Return what stands in front of most of the names that the model knows, an average's before another's."""
    names = set(known)
    found: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                found["".join(f"{part}." for part in parts[:i])] += 1
                break
    # The shortest of equals comes first: max keeps the first one.
    return max(sorted(found, key=len), key=lambda prefix: (found[prefix], "ema" in prefix.lower()), default="")
