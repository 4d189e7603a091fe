"""A network's copy on torch's fake tensors: shapes and gradients without memory or arithmetic."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_copy(network: nn.Module, mode: FakeTensorMode) -> Any:
    """Return a copy of a network whose parameters and buffers are fake tensors: it takes no memory."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(mode.from_tensor(parameter.data), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = mode.from_tensor(buffer)
    return copy.deepcopy(network, memo)
