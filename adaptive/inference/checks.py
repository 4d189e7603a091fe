"""Checks of policies, images and answers, the same at every runner and command; no torch here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_numpy_array, is_torch_array

from adaptive.errors import DataError, ModelError, PolicyError
from adaptive.foreign_text import shell_words
from adaptive.inference.policy import Policy

Array = Any  # a torch tensor or a numpy array

FLOATS = ("float16", "bfloat16", "float32", "float64")
ONE_EXIT = "the network has one exit, where nobody can leave early: leave the policy out (remove a policy.json)"
_NAMED = 3  # images that a message names by their numbers


def read_policy(path: str | Path, exits: int) -> Policy:
    """Read the policy of a network with so many exits, not yet checked.

    Raises:
        PolicyError: it cannot be read; the remedy is one for such a network.
    """
    try:
        return Policy.load(path)
    except PolicyError as error:
        if exits > 1:
            raise
        raise PolicyError(f"{str(error).rpartition('; ')[0]}; {ONE_EXIT}") from None


def check_policy(
    policy: Any,
    exit_names: Sequence[str],
    fingerprint: Callable[[], str | None],
    *,
    name: str = "the policy",
    owner: str = "the network",
    run: str = "RUN",
) -> None:
    """Refuse what is no policy of a network.

    Args:
        policy: to be checked.
        exit_names: modules after which the network's early exits branch off.
        fingerprint: gives the network's; None where it is not known, as after a conversion. Called only if needed.
        name: of the policy, for the message.
        owner: of the weights, for the message.
        run: folder to calibrate, for the message.

    Raises:
        PolicyError: no policy, for another number of exits, or calibrated for other weights.
    """
    exits = len(exit_names) + 1
    calibrate = f"calibrate: adaptive calibrate {shell_words(run)} --budget 0.5" if exits > 1 else ONE_EXIT
    if not isinstance(policy, Policy):
        raise PolicyError(f"{name} is a {type(policy).__name__}; give what adaptive.Policy.load returns")
    if policy.exits != exits:
        raise PolicyError(f"{name} is for {policy.exits} exits, {owner} has {exits}; {calibrate}")
    if policy.network is None:
        return
    theirs, own = policy.network, fingerprint()
    if theirs.exits != list(exit_names) or own not in (None, theirs.fingerprint):
        known = f"exits after {', '.join(exit_names)}" if own is None else f"fingerprint {own[:12]}"
        raise PolicyError(
            f"{name} was calibrated for other weights ({theirs.backbone}, fingerprint {theirs.fingerprint[:12]}) than "
            f"those of {owner} ({known}); {calibrate}"
        )


def check_images(images: Any, channels: int, side: int) -> None:
    """Refuse what is no batch of images for a network (DataError).

    Args:
        images: a numpy array or a torch tensor.
        channels: C of the network's (N, C, H, W).
        side: H and W, in pixels.
    """
    takes = f"this network takes floats (N, {channels}, {side}, {side}), as its transform makes them"
    if not (is_numpy_array(images) or is_torch_array(images)):
        raise DataError(f"images are a {type(images).__name__}; {takes}")
    kind = str(getattr(images.dtype, "name", images.dtype)).removeprefix("torch.")
    if kind not in FLOATS or len(images.shape) != 4 or tuple(images.shape[1:]) != (channels, side, side):
        raise DataError(f"images are {kind} of shape {tuple(images.shape)}; {takes}")
    if is_torch_array(images) and (images.device.type == "meta" or "strided" not in str(images.layout)):
        raise DataError(f"images lie on device {images.device} as {images.layout}; give a dense tensor with values")


def checksum(values: Array) -> Array:
    """Return the sum of all values, which is finite only if each of them is; a device is not waited for."""
    xp = array_namespace(values)
    with np.errstate(over="ignore", invalid="ignore"):
        return xp.sum(values, dtype=xp.float32)


def check_finite(total: Array, images: Callable[[], Array], probabilities: Array) -> None:
    """Refuse images, and then answers, that hold NaN or infinite values.

    Args:
        total: sum of the checksums of both; the values are looked at only if it is not finite.
        images: gives the batch (N, C, H, W).
        probabilities: the answers (N, classes).

    Raises:
        DataError: an image is not finite.
        ModelError: an answer is not.
    """
    if not math.isfinite(float(total)):
        refuse_broken_images(images())
        refuse_broken_answers(probabilities)


def refuse_broken_images(images: Array, first: int = 0) -> None:
    """Name the images (N, C, H, W) that hold NaN or infinite values, counted from ``first`` on (DataError)."""
    broken = [first + i for i in _broken(images)]
    if broken:
        holds = "holds" if len(broken) == 1 else "hold"
        raise DataError(f"{_numbered(broken)} {holds} NaN or infinite values; leave it out, or mend what made it")


def refuse_broken_answers(probabilities: Array, numbers: Sequence[int] | None = None) -> None:
    """Name the images whose answers (N, classes) hold NaN or infinite values, by their numbers (ModelError)."""
    broken = [i if numbers is None else int(numbers[i]) for i in _broken(probabilities)]
    if broken:
        raise ModelError(
            f"the network's answer to {_numbered(broken)} is NaN or infinite: its weights or its precision are broken; "
            "adaptive evaluate RUN counts such answers at every exit"
        )


def check_answers(outputs: Iterable[Array]) -> None:
    """Refuse logits or probabilities, per exit (N, classes), that hold NaN or infinite values (ModelError)."""
    for values in outputs:
        if not math.isfinite(float(checksum(values))):
            refuse_broken_answers(values)


def _broken(values: Array) -> list[int]:
    """Positions in the first dimension that hold NaN or infinite values."""
    xp = array_namespace(values)
    fine = xp.all(xp.isfinite(xp.reshape(values, (values.shape[0], -1))), axis=1)
    return [i for i, good in enumerate(fine.tolist()) if not good]


def _numbered(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"image {numbers[0]} (from 0)"
    rest = len(numbers) - _NAMED
    return f"images {', '.join(map(str, numbers[:_NAMED]))}{f' and {rest} more' if rest > 0 else ''} (from 0)"
