"""The least time that a training step can take on a card: every operation at the card's peak rate or bandwidth.

The step of a `benchmarks.shared.variants.Trainee` runs on fake tensors, so that any batch is traced anywhere, and every
operation is noted with its floating-point operations and the bytes that it reads and writes. An operation can be no
faster than the slower of the two (Williams et al., "Roofline", CACM 2009), and none can begin before the host has
launched the one before it. Views are free. Low precision is that of autocast on a CPU, which keeps a few more
operations in bf16 than CUDA's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from adaptive.networks.precision import autocast
from adaptive.planning.activations import fake_copy
from adaptive.training.losses.objective import ExitObjective
from benchmarks.shared.cards import Card
from benchmarks.shared.plain_loop import summed_loss
from benchmarks.shared.variants import LEARNING_RATE, StepSettings, Variant, build_network

LAUNCH_SECONDS = 5e-6  # of one kernel in eager mode, by the host: stated, the order that is seen on current machines


class Operation(NamedTuple):
    """One operation of a step: floating-point operations of products and convolutions, bytes read and written."""

    name: str
    flops: int
    bytes: int


@dataclass(frozen=True)
class StepCost:
    """All operations of a training step: forward pass, losses, backward pass, optimizer."""

    operations: tuple[Operation, ...]

    @property
    def flops(self) -> int:
        """Floating-point operations, two per multiply-add."""
        return sum(one.flops for one in self.operations)

    @property
    def bytes(self) -> int:
        """Bytes read and written, every operation by itself, as eager mode does it."""
        return sum(one.bytes for one in self.operations)

    def eager_floor(self, card: Card, precision: str) -> float:
        """Seconds at least, with every operation a kernel of its own; in fp32 convolutions use TF32, as by default."""
        return self._floor(self.operations, card, precision)

    def fused_floor(self, card: Card, precision: str) -> float:
        """Seconds at least if everything but products and convolutions were fused into these and free."""
        return self._floor((one for one in self.operations if one.flops), card, precision)

    def launch_floor(self) -> float:
        """Seconds that a host needs to launch the operations one by one."""
        return LAUNCH_SECONDS * len(self.operations)

    @staticmethod
    def _floor(operations: Iterable[Operation], card: Card, precision: str) -> float:
        seconds = 0.0
        for one in operations:
            rounded = precision == "fp32" and "convolution" in one.name
            rate = 1e12 * card.tflops["tf32" if rounded else precision]
            seconds += max(one.flops / rate, one.bytes / card.bandwidth)
        return seconds


def trace_step(settings: StepSettings, variant: Variant) -> StepCost:
    """Trace a step of a variant, in seconds of this CPU and without memory for it; ``settings.device`` is ignored."""
    network = build_network(replace(settings, device="cpu"), variant)
    exits = len(network.exits) if variant.arguments is not None else 1  # type: ignore[arg-type]
    objective = ExitObjective(exits, gamma=variant.gamma)
    mode = FakeTensorMode()
    fake = fake_copy(network, mode)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    context = autocast("bf16", torch.device("cpu")) if settings.precision == "bf16" else nullcontext()
    with torch.random.fork_rng(devices=[]), mode:
        optimizer = torch.optim.SGD(fake.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4, foreach=True)
        side = settings.image_size
        images = torch.empty(settings.batch, 3, side, side).contiguous(memory_format=layout)
        labels = torch.zeros(settings.batch, dtype=torch.long)

        def step() -> None:
            with context:
                outputs = fake(images)
            _loss(variant, objective, outputs, labels).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()  # makes the optimizer's state
        return StepCost(_noted(step))


def _loss(variant: Variant, objective: ExitObjective, outputs: Any, labels: Tensor) -> Tensor:
    if variant.arguments is None:
        return F.cross_entropy(outputs.float(), labels)
    if variant.loop:
        return summed_loss(outputs, labels)
    return objective(outputs, labels, outputs[-1] if variant.gamma else None).total


def _noted(step: Callable[[], None]) -> tuple[Operation, ...]:
    with _Notes() as notes:
        step()
    return tuple(notes.operations)


class _Notes(TorchDispatchMode):
    """Notes every operation that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read, made = _tensors((args, kwargs)), _tensors(result)
        storages = {id_of(tensor) for tensor in read}
        new = [tensor for tensor in made if id_of(tensor) not in storages]
        written = _written(func, args, kwargs or {})
        if new or written:
            total = sum(map(_size, [*read, *new, *written]))
            flops = _flops(func._overloadpacket, args, kwargs or {}, result)
            self.operations.append(Operation(str(func._overloadpacket), flops, total))
        return result


def _flops(operation: Any, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Floating-point operations of a product or convolution, 0 of anything else."""
    if operation is torch.ops.aten.convolution_backward:  # torch's own count takes a grouped one for a whole one
        gradient, _, weight, *_, mask = args
        return sum(mask[:2]) * 2 * gradient.numel() * weight[0].numel()
    count = flop_registry.get(operation)
    return int(count(*args, **kwargs, out_val=result)) if count else 0


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation changes in place."""
    names = zip(func._schema.arguments, args, strict=False)
    values = [(argument, value) for argument, value in names] + [
        (argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs
    ]
    changed = [value for argument, value in values if argument.alias_info is not None and argument.alias_info.is_write]
    return _tensors(changed)


def id_of(tensor: Tensor) -> int:
    """Return what tells storages apart."""
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; of an expanded one only what lies in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
