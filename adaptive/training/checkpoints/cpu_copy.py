"""Copies on the CPU that nothing else refers to."""

from __future__ import annotations

import torch
from torch import Tensor


def cpu_copy(tensor: Tensor) -> Tensor:
    """Return an independent, contiguous copy on the CPU, made in one go; from a GPU into pinned memory, which is fast.

    torch keeps pinned memory for the next copies of that size instead of giving it back.
    """
    source = tensor.detach()
    copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
    return copy.copy_(source)
