"""Cost: multiply-adds and parameters up to an exit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

LINEAR_OPS = {
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten._scaled_mm,
    torch.ops.aten.convolution,
    torch.ops.aten._convolution,
    torch.ops.aten.cudnn_convolution,
    torch.ops.aten.convolution_overrideable,
    torch.ops.aten._slow_conv2d_forward,
}


@dataclass(frozen=True)
class ExitCost:
    """What has been spent when an exit has answered, for one image.

    Attributes:
        macs: multiply-adds of convolutions and linear layers (attention's products of activations are not counted), up to
            and including this exit, with the heads of all earlier exits and every collaboration link on the way.
        parameters: parameters of the same parts.
    """

    macs: int
    parameters: int


def count_macs(counter: FlopCounterMode) -> int:
    """Multiply-adds of convolutions and linear layers that a counter has seen so far."""
    return sum(flops for op, flops in counter.flop_counts["Global"].items() if op in LINEAR_OPS) // 2
