"""CUDA graphs: all kernels of a function recorded once and launched together, between inputs and outputs that stay.

A recorded graph reads and writes fixed memory. So inputs are copied into static ones, and what a call returns is
overwritten by the next call of the same graph: whoever needs it longer copies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adaptive.errors import MachineError

Function = Callable[..., tuple[Tensor, ...]]
WARM_UPS = 3  # kernels are loaded and chosen in the first calls, which no graph may record


class Captured(NamedTuple):
    """A recorded function: what runs it again on the inputs' memory, and its outputs, which that overwrites."""

    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


class Capture(Protocol):
    """A way of recording functions."""

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Captured:
        """Run the function on inputs whose memory stays, and record what it does."""


class CudaCapture:
    """Records functions as CUDA graphs that share one memory pool: they never run at the same time.

    Args:
        device: a CUDA device.

    Raises:
        MachineError: it is another one.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise MachineError(
                f"accelerate: CUDA graphs need a CUDA device, the network is on {device.type!r}; "
                "move it with network.to('cuda'), or use accelerate='compile' or None"
            )
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Captured:
        """Warm up on a side stream, as torch asks for, and record there."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    function(*inputs)
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # What other threads do on the device meanwhile, such as pinning memory, is not recorded and does no harm.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                outputs = function(*inputs)
        return Captured(graph.replay, outputs)


class Graphs:
    """Turns functions of tensors into recorded ones.

    Args:
        capture: records one.
        before: what a function is turned into first, as by a compiler.
    """

    def __init__(
        self, capture: Capture, before: Callable[[Function, Sequence[Tensor]], Function] | None = None
    ) -> None:
        self._capture, self._before = capture, before

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> Function:
        """Record a function for inputs of these shapes, types and strides.

        The result takes such inputs. Its outputs live until it is called again.
        """
        static = [torch.empty_like(t).copy_(t) for t in inputs]  # in the same strides, unless these overlap
        if self._before is not None:
            function = self._before(function, static)
        replay, outputs = self._capture(function, static)

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            for place, tensor in zip(static, tensors, strict=True):
                place.copy_(tensor, non_blocking=True)
            replay()
            return outputs

        return run
