"""How a network computes: its precision (by autocast, the weights stay float32) and the memory format of its images."""

from __future__ import annotations

import torch

PRECISION_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device, cache: bool = True) -> torch.autocast:
    """Return the autocast context for ``fp32`` (off), ``bf16`` or ``fp16``.

    ``cache``: keep a weight's cast until the outermost context ends, instead of casting it at every use.
    """
    dtype = PRECISION_DTYPES.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32", cache_enabled=cache)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Return the memory format of images and convolution weights, (N, C, H, W) with C innermost or outermost."""
    return torch.channels_last if channels_last else torch.contiguous_format
