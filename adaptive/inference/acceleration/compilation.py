"""Compilation: a function of tensors by torch.compile for one set of shapes, as a whole and exactly once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor


class Compilation:
    """Turns functions of tensors into compiled ones.

    Args:
        backend: of torch.compile.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self._backend = backend
        self._made = 0

    def __call__(
        self, function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
    ) -> Callable[..., tuple[Tensor, ...]]:
        """Compile a function for inputs of these shapes, types and strides, now.

        The result takes inputs of these shapes and types; other strides, which would have torch.compile start again,
        are brought into the old ones.
        """
        layouts = [torch.empty_like(tensor, device="meta") for tensor in inputs]  # dense, if their strides overlap
        self._made += 1
        compiled = torch.compile(
            with_its_own_code(function, f"{function.__name__}_{self._made}"),
            fullgraph=True,
            dynamic=False,
            backend=self._backend,
        )

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            return compiled(*map(_laid_out, tensors, layouts))

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            run(*inputs)
        return run


def _laid_out(tensor: Tensor, layout: Tensor) -> Tensor:
    """The tensor in these strides and, as all that is made here, an inference tensor: kinds are compiled apart."""
    if tensor.stride() == layout.stride() and tensor.is_inference():
        return tensor
    return torch.empty_like(layout, device=tensor.device).copy_(tensor)


def with_its_own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A copy of a function that torch.compile sees as another one.

    It counts compilations by code object, and gives up after eight; closures of one definition share theirs.
    """
    plain = cast(FunctionType, function)
    code: CodeType = plain.__code__.replace(co_name=name)
    return FunctionType(code, plain.__globals__, name, plain.__defaults__, plain.__closure__)
