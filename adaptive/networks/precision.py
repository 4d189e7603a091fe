"""Lower precision by autocast: weights stay as they are, convolutions and linear layers run in the given type."""

from __future__ import annotations

import torch

PRECISION_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context for ``fp32`` (off), ``bf16`` or ``fp16``."""
    dtype = PRECISION_DTYPES.get(precision, torch.bfloat16)
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
