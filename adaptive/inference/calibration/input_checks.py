"""Checks of what calibration is given: shapes, labels, finite numbers, probabilities, costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adaptive.errors import PolicyError
from adaptive.inference.calibration.thresholds import check_costs
from adaptive.inference.checks import check_answers


def check_name(key: str, value: str, known: Sequence[str]) -> None:
    """Refuse a name that is none of the known ones (PolicyError)."""
    if value not in known:
        raise PolicyError(f"{key} {value!r} is unknown; use one of {', '.join(known)}")


def check_outputs(name: str, outputs: Any, labels: Any, costs: Sequence[float]) -> tuple[Tensor, Tensor, list[float]]:
    """Return outputs (k, N, C) float32, labels (N,) int64 and costs as numbers, on the CPU.

    Args:
        name: of the outputs, for the message.
        outputs: logits or probabilities, a torch tensor or a numpy array.
        labels: whole numbers below C.
        costs: of one image up to each exit.

    Raises:
        PolicyError: one of them does not fit.
        ModelError: outputs are NaN or infinite.
    """
    values, truth = torch.as_tensor(outputs).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if values.ndim != 3 or not values.is_floating_point():
        raise PolicyError(
            f"{name}: {values.dtype} of shape {tuple(values.shape)}; give floats (exits, images, classes)"
        )
    exits, images, classes = values.shape
    if not exits or not images or classes < 2:
        raise PolicyError(f"{name}: {exits} exits, {images} images, {classes} classes; give some held-out images")
    if truth.shape != (images,) or truth.is_floating_point():
        raise PolicyError(f"labels: {truth.dtype} of shape {tuple(truth.shape)}; give {images} whole numbers")
    if not 0 <= int(truth.min()) <= int(truth.max()) < classes:
        wrong = truth[(truth < 0) | (truth >= classes)][0]
        raise PolicyError(f"labels: {wrong} is none of the {classes} classes; give 0 to {classes - 1}")
    check_answers(values)
    prices = [float(cost) for cost in costs]
    check_costs(prices, exits)
    return values.float(), truth.long(), prices


def check_probabilities(values: Tensor) -> None:
    """Refuse what is below 0 or does not sum to 1 over the classes (PolicyError)."""
    furthest = float((values.sum(dim=-1) - 1).abs().max())
    if float(values.min()) < 0 or furthest > 1e-2:
        raise PolicyError(
            f"probabilities: some lie below 0 or sum to 1 +- {furthest:.2g}; give softmax outputs, not logits"
        )
