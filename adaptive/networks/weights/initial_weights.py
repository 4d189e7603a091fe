"""Fills a timm model with the weights of a file, by timm's own way of loading pretrained ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from adaptive.errors import ModelError, reason_of
from adaptive.networks.backbone import Backbone, classifier_names, configuration
from adaptive.networks.weights.weights_file import WeightsFile, read_weights

log = logging.getLogger(__name__)
MOST_NAMES = 3  # in a message


def load_file(plain: Backbone, path: Path) -> set[str]:
    """Load a file of weights into a plain timm model; see `read_weights` and `load_state`.

    What the file holds and the model does not take, and what was resized, is logged in one line.

    Returns:
        Names of the model's tensors that are as they were.

    Raises:
        ModelError: the file is missing, cannot be read, or does not fit the model.
    """
    file = read_weights(path, plain.model.state_dict())
    fresh = load_state(plain, file.state, f"weights = {str(path)!r}")
    told = _differences(plain, file, fresh)
    if told:
        log.warning("weights = %r: %s", str(path), "; ".join(told))
    return fresh


def load_state(plain: Backbone, state: Mapping[str, Tensor], source: str) -> set[str]:
    """Load a plain timm model's state_dict, of another image size, number of channels or number of classes too.

    timm builds the model that the state is of, with the image size and channels wanted here, and adapts the state to
    it as it does with its pretrained weights: filters for other names, position embeddings and bias tables resampled,
    the first convolution's channels summed or repeated. What it loads strictly is copied. A classifier that the state
    lacks, or has for other classes, stays as it is.

    Args:
        plain: the model; filled in place.
        state: by timm's names, or such as timm's filter for this model translates.
        source: what to call it in messages.

    Returns:
        Names of the model's tensors that are as they were.

    Raises:
        ModelError: the state does not fit.
    """
    current = plain.model.state_dict()
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(plain.name, **_arguments(plain, state))
    except Exception as error:  # torch, and timm's filters on names that they do not expect
        raise ModelError(f"{source}: does not fit the backbone: {reason_of(error)}") from error
    loaded = model.state_dict()
    fresh = {key for key, value in current.items() if key not in loaded or loaded[key].shape != value.shape}
    plain.model.load_state_dict({key: current[key] if key in fresh else loaded[key] for key in current})
    return fresh


def left_fresh(plain: Backbone) -> set[str]:
    """Return the names of a model's tensors that timm's own pretrained weights, just loaded, left as they were."""
    wanted, noted = plain.arguments.get("num_classes"), configuration(plain.model)
    if wanted in (None, noted.get("num_classes")):
        return set()
    fresh = {key for key in plain.model.state_dict() if key.startswith(classifier_names(plain.model))}
    there = f"{noted.get('num_classes')} classes, not the {wanted} here"
    log.warning("pretrained weights of %s are of %s: %s left out", plain.name, there, _listed(sorted(fresh)))
    return fresh


def _arguments(plain: Backbone, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of timm.create_model that make the state's own model, of this one's image size."""
    noted = configuration(plain.model)
    classes, offset = _classes(plain, state)
    channels, sides = _channels(plain, state), tuple(noted.get("input_size", (3, 224, 224)))[1:]
    about = {"num_classes": classes, "label_offset": offset, "input_size": (channels, *sides), "custom_load": False}
    overlay = {**plain.arguments.get("pretrained_cfg_overlay", {}), "state_dict": dict(state), **about}
    given = {**plain.arguments, "num_classes": classes, "pretrained": True, "pretrained_cfg_overlay": overlay}
    return given if channels == plain.channels else {**given, "in_chans": plain.channels}


def _classes(plain: Backbone, state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of classes of a state's model (0: it has no classifier), and of rows in front of them."""
    wanted = int(plain.arguments.get("num_classes", configuration(plain.model).get("num_classes", 1000)))
    names = classifier_names(plain.model)
    rows = next((len(state[f"{name}weight"]) for name in names if f"{name}weight" in state), None)
    if rows is None:
        foreign = not set(state) & set(plain.model.state_dict())  # names that only timm's filter knows
        return (wanted if foreign or not names else 0), 0
    offset = int(configuration(plain.model).get("label_offset") or 0)
    return (wanted, offset) if rows == wanted + offset else (rows, 0)


def _channels(plain: Backbone, state: Mapping[str, Tensor]) -> int:
    """Return the channels of the images that a state's model takes, from its first convolution's width."""
    default = int(configuration(plain.model).get("input_size", (3,))[0])
    names = configuration(plain.model).get("first_conv") or ()
    own = plain.model.state_dict()
    for name in (names,) if isinstance(names, str) else names:
        there, here = state.get(f"{name}.weight"), own.get(f"{name}.weight")
        if there is not None and here is not None and there.dim() == here.dim() == 4:
            channels, rest = divmod(there.shape[1] * plain.channels, here.shape[1])
            return default if rest else channels
    return default


def _differences(plain: Backbone, file: WeightsFile, fresh: Iterable[str]) -> list[str]:
    """Say what of a file was left out or changed, and what of the model stayed fresh."""
    now, fresh = plain.model.state_dict(), sorted(fresh)
    told = []
    if missing := [name for name in fresh if name not in file.state]:
        told.append(f"it has no classifier: {_listed(missing)} start afresh")
    if others := [name for name in fresh if name in file.state]:
        wanted = plain.arguments.get("num_classes")
        told.append(f"its {len(file.state[others[0]])} classes are not the {wanted} here: {_listed(others)} left out")
    if file.left_out:
        told.append(f"{_listed(file.left_out)} left out, which belong to no part of the backbone")
    shapes = {k: (tuple(v.shape), tuple(now[k].shape)) for k, v in file.state.items() if k in now and k not in fresh}
    if resized := [f"{key} {was} to {new}" for key, (was, new) in shapes.items() if was != new]:
        told.append(f"resized: {_listed(resized)}")
    return told


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
