"""Cost of an exit: multiply-adds (MACs) and parameters up to it, counted while the network runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

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
    """Cumulative cost of one image up to and including an exit.

    Attributes:
        macs: multiply-adds of convolutions and linear layers (attention's products of activations are not counted),
            up to and including this exit, with the heads of all earlier exits and every collaboration link on the way.
        parameters: parameters of the same parts.
    """

    macs: int
    parameters: int


class MacCounter(TorchDispatchMode):
    """Counts the multiply-adds of convolutions and linear layers that run under it.

    The formulas are those of torch.utils.flop_counter. Its FlopCounterMode itself also follows modules through
    autograd, which fails on models that make class tokens from parameters while gradients are off (CaiT).
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a fake tensor is asked for its device; there is nothing to decompose
            return func(*args, **kwargs)
        if func._overloadpacket not in LINEAR_OPS:
            with self:  # inference mode leaves aten.linear whole; its parts are counted
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        result = func(*args, **kwargs)
        self.macs += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result) // 2
        return result
