"""A GPU without a GPU: torch's fake tensors have a device and a shape, and refuse what lies on another device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

Module = TypeVar("Module", bound=nn.Module)


@contextmanager
def as_on_cuda(module: Module) -> Iterator[Module]:
    """Give a copy of a module as ``to("cuda")`` would make it; inside, every tensor that is made is a fake one.

    What lies neither in a parameter nor in a buffer stays a real tensor, which the copy's operations refuse. Autograd's
    backward pass asks for CUDA itself and cannot be run like that; what needs a value (`nonzero`, `item`) neither.
    """
    whole = copy.deepcopy(module)
    moved: dict[int, torch.Tensor] = {}
    with FakeTensorMode():
        for part in whole.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _moved(tensor)
                    tensors[name] = moved[id(tensor)]
        yield whole


def _moved(tensor: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    return nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
