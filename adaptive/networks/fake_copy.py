"""Copies of a network that take no memory and do no arithmetic: on torch's fake tensors, or on its meta device.

Fake tensors are on a device and can be followed through autograd; the meta device is several times quicker.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

Network = TypeVar("Network", bound=nn.Module)
PATCH = 16  # pixels along a patch's side; a stage's typical stride is as large
CHEAP_WEIGHTS = 2**25  # parameters: 128 MiB
CHEAP_COMPUTE = 1e9  # parameters times positions; below, arithmetic costs less than looking at every operation


def fake_copy(network: nn.Module, mode: FakeTensorMode) -> Any:
    """Return a copy of a network on fake tensors, on its own device; of an outline on the CPU."""
    return _copy(network, lambda tensor: fake_like(tensor, mode))


def fake_like(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """Return a fake tensor of the same shape, strides, type and device; of an outline's on the CPU."""
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def outline(network: Network, dtype: torch.dtype | None = None) -> Network:
    """Return a copy of a network on the meta device; ``dtype`` of its floating-point tensors, where it is another."""

    def empty(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="meta")

    return _copy(network, empty)


def is_outline(network: nn.Module) -> bool:
    """Whether a network has no numbers: it was built on the meta device, and cannot run for real."""
    return any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def cheap_to_run(network: nn.Module, size: int) -> bool:
    """Whether a real pass on a few images of ``size`` pixels costs less than one of the network's outline."""
    parameters = sum(p.numel() for p in network.parameters())
    return parameters < CHEAP_WEIGHTS and parameters * (size / PATCH) ** 2 < CHEAP_COMPUTE and not is_outline(network)


def is_recurrent(network: nn.Module) -> bool:
    """Whether it has recurrent layers, which torch computes, and so counts, in another way on the meta device."""
    return any(isinstance(module, nn.RNNBase) for module in network.modules())


def _copy(network: Network, replace: Callable[[Tensor], Tensor]) -> Network:
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(replace(parameter), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = replace(buffer)
    return copy.deepcopy(network, memo)
