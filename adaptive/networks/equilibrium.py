"""Gradient Equilibrium (GE): a fork at every branch point (Li et al., ICCV 2019, arXiv 1908.06294, section 3.1)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from adaptive.errors import ModelError

Equilibrium = Literal["crossing", "tap", False]


def equilibrium_scope(equilibrium: bool | str) -> Equilibrium:
    """Return which tensors Gradient Equilibrium rescales: True stands for the published rule, ``crossing``.

    Raises:
        ModelError: none of True, False, ``crossing`` and ``tap``.
    """
    if equilibrium in (True, "crossing"):
        return "crossing"
    if equilibrium == "tap":
        return "tap"
    if equilibrium is False:
        return False
    raise ModelError(f"equilibrium = {equilibrium!r}: use True, 'crossing', 'tap' or False")


class _Fork(torch.autograd.Function):
    """Identity with two outputs whose backward interpolates the two incoming gradients in one operation."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, share: float) -> tuple[Tensor, Tensor]:
        ctx.share = share
        # Without this, autograd would fill the gradient of an unused output with zeros: a whole feature map.
        ctx.set_materialize_grads(False)
        return feature.view_as(feature), feature.view_as(feature)

    @staticmethod
    def backward(ctx: Any, exit_gradient: Tensor | None, onward_gradient: Tensor | None) -> tuple[Tensor | None, None]:
        if exit_gradient is None:
            return (None if onward_gradient is None else onward_gradient * (1 - ctx.share)), None
        if onward_gradient is None:
            return exit_gradient * ctx.share, None
        return torch.lerp(onward_gradient, exit_gradient, ctx.share), None


def fork(feature: Tensor, remaining: int) -> tuple[Tensor, Tensor]:
    """Split a feature into the one that an exit reads and the one that the next block reads.

    With n = ``remaining`` exits at or behind this branch point (k - i + 1 at exit i of k), the backward pass gives
    ``exit_gradient / n + onward_gradient * (n - 1) / n``, one interpolation, so that every block ends up with the mean
    of the gradients of all exits at or behind it.

    Args:
        feature: tensor of any shape.
        remaining: number of exits at or behind this point, this one included.

    Returns:
        The feature twice: for the exit, and onward. Neither may be changed in place while gradients are recorded.
    """
    exit_side, onward = _Fork.apply(feature, 1.0 / remaining)
    return exit_side, onward


def branch(state: tuple[Tensor, ...], remaining: int, scope: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Fork everything that crosses a branch point.

    Args:
        state: the crossing tensors; the exit reads the first one.
        remaining: number of exits at or behind this point, this one included.
        scope: ``crossing`` rescales every crossing tensor (the published rule), ``tap`` only the one that the exit
            reads (the authors' released code).

    Returns:
        The exit's tensor, and the state for the next block.
    """
    tap, onward = fork(state[0], remaining)
    others = state[1:]
    if scope != "tap":
        others = tuple(fork(t, remaining)[1] if t.is_floating_point() and t.requires_grad else t for t in others)
    return tap, (onward, *others)
