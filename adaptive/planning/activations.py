"""The activation memory of a training step, traced on fake tensors, so that nothing is computed.

The real network, task and losses run on torch's fake tensors, which have shapes, types and storages but no memory, so
that any batch is traced in seconds on any machine. Every storage is counted once, from the operation that makes it to
the moment at which nothing refers to it any more. What an operation takes inside itself (cuDNN's workspace, oneDNN's
scratchpad) is not seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adaptive.config.sections import Config
from adaptive.networks.fake_copy import fake_copy
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast, memory_format
from adaptive.training.batch import BatchSizes
from adaptive.training.learner import Learner, build_task
from adaptive.training.losses.distillation import NetworkTeacher, Teacher, last_exit, next_exit
from adaptive.training.losses.model_teacher import unloaded_teacher
from adaptive.training.phases import PhasePlan, prepare_phase, set_modes
from adaptive.training.prepared_run import Setup

Bytes = NDArray[np.float64]
CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Counts the live bytes of all tensor storages that operations make while this mode is active.

    Attributes:
        live: bytes now.
        peak: the most since the block began, or since ``peak`` was set.
        history: ``live`` after every operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.history: list[int] = []
        self._sizes: dict[int, int] = {}
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Leave these tensors' storages out."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        self.history.append(self.live)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._sizes or key in self._known:
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@dataclass(frozen=True)
class Trace:
    """The activation memory of a training step with one micro batch.

    Attributes:
        batch: images in it.
        kept: bytes alive at the end of the forward pass: what the backward pass will need.
        live: (n,) bytes alive at n moments of forward and backward pass, gradients of parameters left out.
        gradients: (n,) bytes of the parameters' gradients that are complete by then.
        evaluation: most bytes alive in a forward pass without gradients.
    """

    batch: int
    kept: int
    live: Bytes
    gradients: Bytes
    evaluation: int


@dataclass(frozen=True)
class Activations:
    """The activation memory of micro batches of any size: a constant and bytes per image, at each moment of a step."""

    small: Trace
    large: Trace

    def kept(self, batch: int) -> int:
        """Return the bytes alive at the end of the forward pass of ``batch`` images."""
        return round(self._line(self.small.kept, self.large.kept, batch))

    def evaluation(self, batch: int) -> int:
        """Return the most bytes alive in a forward pass without gradients."""
        return round(self._line(self.small.evaluation, self.large.evaluation, batch))

    def moments(self, batch: int) -> tuple[Bytes, Bytes]:
        """Return (live, gradients) as `Trace` has them; moments that a later one exceeds in both are left out."""
        if len(self.small.live) == len(self.large.live):
            live, gradients = self._line(self.small.live, self.large.live, batch), self.small.gradients
        else:  # an operation that depends on the batch's size: take the larger trace in proportion
            live, gradients = self.large.live * (batch / self.large.batch), self.large.gradients
        later = np.append(np.maximum.accumulate(live[::-1])[::-1][1:], -1.0)
        return live[live > later], gradients[live > later]

    def _line(self, small: Any, large: Any, batch: int) -> Any:
        return small + (large - small) * ((batch - self.small.batch) / (self.large.batch - self.small.batch))


def trace_activations(config: Config, plan: PhasePlan, network: AdaptiveNetwork, micro_batch: int) -> Activations:
    """Trace a micro batch of a phase, and one of twice its size.

    Args:
        config: of the run: precision, checkpointing, memory layout, mixing, teacher.
        plan: the phase.
        network: as built on the CPU; it is left as it is.
        micro_batch: images per rank and forward pass.
    """
    return Activations(*(_trace(config, plan, network, batch) for batch in (micro_batch, 2 * micro_batch)))


def _trace(config: Config, plan: PhasePlan, network: AdaptiveNetwork, batch: int) -> Trace:
    mode = FakeTensorMode()
    fake = fake_copy(network, mode)
    teacher = _fake_teacher(config, plan, network, mode)
    prepare_phase(fake, plan)
    fake.checkpointing = config.train.checkpointing
    with torch.random.fork_rng(devices=[]), mode:
        engine = _Forward(fake, autocast(config.train.precision, CPU))
        setup = Setup(config, BatchSizes(batch, batch, 1, 1), CPU)
        learner = Learner(engine, fake, teacher=teacher)  # type: ignore[arg-type]
        task = build_task(setup, _without_surgery(plan), learner, plan.weights_from(0, 1, config.train.seed))
        size = config.data.image_size
        layout = memory_format(config.train.channels_last)
        images = torch.empty(batch, fake.channels, size, size).contiguous(memory_format=layout)
        labels = torch.zeros(batch, dtype=torch.long)
        set_modes(fake, plan)
        done = _Gradients(fake)
        with LiveBytes() as counter:
            counter.ignore(images, labels, *fake.parameters(), *fake.buffers(), *_tensors_of(teacher))
            loss = task.loss(images, labels, (0, 0, 0))
            kept, forward = counter.live, counter.peak
            start = len(counter.history)
            done.marks = counter.history
            if loss.requires_grad:
                loss.backward()
            del loss
        live = np.array([forward, *counter.history[start:]], dtype=np.float64)
        gradients = done.at(start, len(live))
        with LiveBytes() as counter, torch.no_grad():
            counter.ignore(images, *fake.parameters(), *fake.buffers())
            engine.network.eval()
            engine(images)
        return Trace(batch, kept, live, gradients, counter.peak)


def teacher_model(config: Config, num_classes: int) -> NetworkTeacher:
    """Build the timm model that teaches, without weights (raises ConfigError); under a fake mode it takes no memory."""
    return unloaded_teacher(config.distillation, config.data, num_classes, autocast(config.train.precision, CPU))


class _Forward:
    """The network under autocast, called instead of DeepSpeed's engine."""

    def __init__(self, network: AdaptiveNetwork, context: torch.autocast) -> None:
        self.network, self.context = network, context

    def __call__(self, images: Tensor) -> list[Tensor]:
        with self.context:
            return self.network(images)


class _Gradients:
    """Frees every parameter's gradient as soon as it is complete, and notes when that was."""

    def __init__(self, network: nn.Module) -> None:
        self.marks: list[int] = []
        self._steps: list[tuple[int, int]] = []
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._take)

    def at(self, start: int, count: int) -> Bytes:
        """Return the bytes complete at each of ``count`` moments from operation ``start`` on."""
        arrived = np.zeros(count)
        for position, size in self._steps:
            arrived[min(max(position - start, 0), count - 1)] += size
        return np.cumsum(arrived)

    def _take(self, parameter: Tensor) -> None:
        parameter.grad = None
        self._steps.append((len(self.marks), parameter.numel() * parameter.element_size()))


def _fake_teacher(config: Config, plan: PhasePlan, network: AdaptiveNetwork, mode: FakeTensorMode) -> Teacher | None:
    if plan.gamma == 0:
        return None
    kind = config.distillation.teacher
    if kind in ("last", "next"):
        return last_exit if kind == "last" else next_exit
    if kind != "model":
        return NetworkTeacher(fake_copy(network, mode), autocast(config.train.precision, CPU))
    with mode:
        return teacher_model(config, network.num_classes)


def _tensors_of(teacher: Teacher | None) -> list[Tensor]:
    if not isinstance(teacher, NetworkTeacher):
        return []
    return [*teacher.network.parameters(), *teacher.network.buffers()]


def _without_surgery(plan: PhasePlan) -> PhasePlan:
    return PhasePlan(**{**vars(plan), "surgery": False})
