"""The memory of a training rank, predicted by kind (weights, gradients, activations, ...) at a step's possible peaks.

The formulas follow DeepSpeed 0.19 (``deepspeed/runtime/zero/stage_1_and_2.py``, ``stage3.py``) with the settings that
`adaptive.training.engine.engine` gives it: weights stay fp32 and low precision is autocast, so there is no second,
16-bit copy of them. docs/scaling.md explains them. Not counted: what libraries take for themselves (CUDA's context,
cuDNN's and oneDNN's workspaces), the allocator's fragmentation, loader processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptive.config.sections import Config, OptimizerConfig
from adaptive.networks.fake_copy import fake_like
from adaptive.networks.network import AdaptiveNetwork
from adaptive.planning.activations import Activations, LiveBytes
from adaptive.training.optimizer import build_optimizer, parameter_groups

FP32 = 4
ALIGNMENT = 2  # elements to which ZeRO 1 and 2 align every rank's slice
PLAIN_BUCKET = 500_000_000  # elements that stage 0 reduces at a time (MEMORY_OPT_ALLREDUCE_SIZE)


@dataclass(frozen=True)
class ZeroSettings:
    """The settings of ZeRO that decide memory and traffic; bucket sizes are in elements, not bytes."""

    stage: int
    world: int
    accumulation: int
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence: int = 100_000

    @classmethod
    def of(cls, config: Config, world: int, accumulation: int) -> ZeroSettings:
        """Read them from a configuration; the ``deepspeed`` section may set the three sizes."""
        own: dict[str, Any] = dict(config.deepspeed.get("zero_optimization", {}))
        own |= {f"stage3_{name}": value for name, value in own.items()}  # DeepSpeed takes either name
        return cls(
            int(own.get("stage", config.train.zero_stage)),
            world,
            accumulation,
            int(own.get("reduce_bucket_size", cls.reduce_bucket)),
            int(own.get("stage3_prefetch_bucket_size", cls.prefetch_bucket)),
            int(own.get("stage3_param_persistence_threshold", cls.persistence)),
        )


@dataclass(frozen=True)
class Sizes:
    """Elements of a network's learning parameters by optimizer group, and of frozen ones; bytes of its buffers."""

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]
    buffers: int

    @classmethod
    def of(cls, network: AdaptiveNetwork, optimizer: OptimizerConfig) -> Sizes:
        """Measure a network that `adaptive.training.phases.prepare_phase` has prepared."""
        groups = parameter_groups(network, optimizer)
        return cls(
            tuple(tuple(p.numel() for p in group["params"]) for group in groups),
            tuple(p.numel() for p in network.parameters() if not p.requires_grad),
            sum(b.numel() * b.element_size() for b in network.buffers()),
        )

    @property
    def learning(self) -> int:
        """Elements that learn."""
        return sum(map(sum, self.groups))

    @property
    def stored(self) -> int:
        """Bytes of one whole copy of the network."""
        return FP32 * (self.learning + sum(self.frozen)) + self.buffers

    def slices(self, settings: ZeroSettings) -> list[int]:
        """Return the elements of every group that one rank owns, padding included."""
        world = settings.world
        if settings.stage == 0:
            return [sum(group) for group in self.groups]
        if settings.stage == 3:
            return [sum(-(-n // world) for n in group) for group in self.groups]
        unit = ALIGNMENT * world
        return [-(-sum(group) // unit) * unit // world for group in self.groups]


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes that the optimizer keeps from step to step (state), and those it takes only while it steps (working)."""

    state: int
    working: int


@dataclass(frozen=True)
class Moment:
    """The memory in use at one moment of a step, in bytes by kind."""

    name: str
    kinds: dict[str, int]

    @property
    def total(self) -> int:
        """All kinds together."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class RankMemory:
    """A rank's predicted memory at every moment that may be the peak, and what lies in the host's memory besides.

    ``host`` is what the processes keep in the machine's memory where they train on a GPU; on a CPU it is part of the
    moments, all but the copy that the first rank takes for a checkpoint.
    """

    moments: tuple[Moment, ...]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> Moment:
        """The moment with the most."""
        return max(self.moments, key=lambda moment: moment.total)


def measure_optimizer(
    network: AdaptiveNetwork, config: OptimizerConfig, settings: ZeroSettings, cuda: bool
) -> OptimizerBytes:
    """Step the configured optimizer once on fake tensors, over what one rank owns, and count what it makes.

    ``network`` is one that `adaptive.training.phases.prepare_phase` has prepared. On a GPU torch's optimizers take a
    step over all tensors at a time (foreach), which needs more memory.
    """
    optimizer = build_optimizer(network, config, config.lr)
    sizes = Sizes.of(network, config)
    mode = FakeTensorMode()
    for group, owned in zip(optimizer.param_groups, sizes.slices(settings), strict=True):
        if settings.stage == 0:
            group["params"] = [nn.Parameter(fake_like(p, mode)) for p in group["params"]]
        else:  # ZeRO gives the optimizer one flat tensor per group
            with mode:
                group["params"] = [nn.Parameter(torch.empty(owned))]
        if "foreach" in group and cuda:
            group["foreach"] = True
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with mode:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        with LiveBytes() as counter:
            counter.ignore(*parameters, *(p.grad for p in parameters if p.grad is not None))
            optimizer.step()
            optimizer.step()  # state appears in the first step
        return OptimizerBytes(counter.live, counter.peak - counter.live)


def predict_memory(
    config: Config,
    settings: ZeroSettings,
    sizes: Sizes,
    activations: Activations,
    optimizer: OptimizerBytes,
    micro_batch: int,
    cuda: bool,
    teacher: int = 0,
    surgery: int = 0,
) -> RankMemory:
    """Predict what one rank holds, at the peak and at the other moments of a step.

    Args:
        config: of the run.
        settings: of DeepSpeed.
        sizes: of the prepared network.
        activations: traced.
        optimizer: measured.
        micro_batch: images per rank and forward pass.
        cuda: whether the rank trains on a GPU; on a CPU pages that nobody touches take no memory, a GPU's do.
        teacher: bytes of a teacher's weights.
        surgery: bytes of the exits' separate gradients, for train.gradient_surgery.
    """
    image = FP32 * 3 * config.data.image_size**2 + 8  # and its label
    size = _Bytes.of(settings, sizes, cuda)
    average = sizes.stored if config.train.ema_decay else 0
    kept: dict[str, int] = {
        **_weights(settings, sizes),
        "optimizer": optimizer.state,
        "average": average,
        "teacher": teacher,
        "images": micro_batch * image,
    }
    host = {"template": sizes.stored}
    if not cuda:
        kept |= host
    more = [
        *_passes(settings, size, activations, micro_batch, surgery),
        ("reduction", _reduction(settings, size)),
        ("optimizer step", _step(settings, size, optimizer)),
    ]
    if average and settings.stage == 3:
        more.append(("moving average", {**_whole(settings, sizes), **_lasting(settings, size)}))
    more.append(("validation", _validation(config, settings, sizes, size, activations, image)))
    moments = tuple(Moment(name, _only_present(kept | extra)) for name, extra in more)
    # Whole states of all ranks, gathered on the first one.
    whole = sizes.stored + optimizer.state * (settings.world if settings.stage else 1) + average
    whole += teacher if config.distillation.teacher == "frozen" else 0
    snapshot = {"checkpoint (first rank)": whole}
    return RankMemory(moments, host | snapshot if cuda else snapshot)


def _weights(settings: ZeroSettings, sizes: Sizes) -> dict[str, int]:
    """Return the weights that lie on a rank all the time, ZeRO's lasting copies and buffers included."""
    owned = FP32 * sum(sizes.slices(settings))
    if settings.stage == 0:
        return {"weights": sizes.stored}
    if settings.stage < 3:
        flat = owned * settings.world
        return {"weights": flat + FP32 * sum(sizes.frozen) + sizes.buffers, "master weights": owned}
    frozen = FP32 * sum(-(-n // settings.world) for n in sizes.frozen)
    weights = owned + frozen + sizes.buffers + _persistent(settings, sizes)
    return {"weights": weights, "master weights": owned}


def _persistent(settings: ZeroSettings, sizes: Sizes) -> int:
    """Return the bytes of the small parameters that ZeRO 3 keeps whole on every rank, padding included."""
    every = [*sizes.frozen, *(n for group in sizes.groups for n in group)]
    return _padded(settings, [n for n in every if n <= settings.persistence])


def _padded(settings: ZeroSettings, elements: Iterable[int]) -> int:
    return FP32 * sum(-(-n // settings.world) * settings.world for n in elements)


def _whole(settings: ZeroSettings, sizes: Sizes) -> dict[str, int]:
    """Return what ZeRO 3 gathers while whole weights are needed."""
    if settings.stage < 3:
        return {}
    every = [*sizes.frozen, *(n for group in sizes.groups for n in group)]
    return {"gathered weights": _padded(settings, every) - _persistent(settings, sizes)}


@dataclass(frozen=True)
class _Bytes:
    """Sizes in bytes that several moments of a step have in common, as the device allocates them."""

    learning: int
    owned: tuple[int, ...]
    filled: int  # the bucket's memory once every gradient went through it
    opened: int  # the bucket's memory as it is allocated, before anything lies in it
    flat: int  # the copy that is reduced
    gathered: int
    fetched: int

    @classmethod
    def of(cls, settings: ZeroSettings, sizes: Sizes, cuda: bool) -> _Bytes:
        learning, bucket = FP32 * sizes.learning, FP32 * settings.reduce_bucket
        gathered = _whole(settings, sizes).get("gathered weights", 0)
        return cls(
            learning,
            tuple(FP32 * n for n in sizes.slices(settings)),
            bucket if cuda else min(bucket, learning),
            bucket if cuda else 0,
            min(learning, bucket if settings.stage else FP32 * PLAIN_BUCKET),
            gathered,
            min(gathered, FP32 * settings.prefetch_bucket),
        )


def _passes(
    settings: ZeroSettings, size: _Bytes, activations: Activations, micro_batch: int, surgery: int
) -> list[tuple[str, dict[str, int]]]:
    """Return what the forward pass, and the worst moment of the backward pass, add to the lasting kinds."""
    stage, several = settings.stage, settings.accumulation > 1
    live, arrived = activations.moments(micro_batch)
    found = []
    for alive, complete in zip(map(round, live.tolist()), map(round, arrived.tolist()), strict=True):
        extra = {"activations": alive, "surgery": surgery}
        if stage <= 1:
            extra |= {"gradients": size.learning if several else complete, "buckets": stage * size.opened}
        elif stage == 2:
            extra |= {"gradients": several * sum(size.owned), "buckets": max(size.opened, min(size.filled, complete))}
        else:  # a weight is given back after its last use, which is when its gradient is complete
            extra |= {"gathered weights": max(0, size.gathered - complete), **_lasting(settings, size)}
        found.append(extra)
    worst = max(found, key=lambda extra: sum(extra.values()))
    if stage < 3:
        return [("forward and backward pass", worst)]
    # All that is prefetched at a time stays in one piece until the last weight of it was used.
    forward = {"activations": activations.kept(micro_batch), "gathered weights": size.gathered, "copies": size.fetched}
    return [("forward pass", forward | _lasting(settings, size)), ("backward pass", worst)]


def _reduction(settings: ZeroSettings, size: _Bytes) -> dict[str, int]:
    """Return what is held while the last gradients are averaged: they, in the bucket, and the copy that is reduced."""
    if settings.stage == 0:
        return {"gradients": size.learning, "copies": size.flat}
    kept = sum(size.owned) if settings.stage == 2 and settings.accumulation > 1 else 0
    return {"gradients": kept, "buckets": size.filled, "copies": size.flat, **_lasting(settings, size)}


def _step(settings: ZeroSettings, size: _Bytes, optimizer: OptimizerBytes) -> dict[str, int]:
    """Return what is held while the optimizer steps: gradients, from stage 1 on flat copies, and its own needs."""
    if settings.stage == 0:
        return {"gradients": size.learning, "copies": optimizer.working}
    gradients = {"gradients": sum(size.owned)}
    return {**gradients, **_lasting(settings, size), "copies": optimizer.working + max(size.owned)}


def _lasting(settings: ZeroSettings, size: _Bytes) -> dict[str, int]:
    """Return what ZeRO 3 keeps between the steps, and other stages give back."""
    return {"gradients": sum(size.owned), "buckets": size.filled} if settings.stage == 3 else {}


def _validation(
    config: Config, settings: ZeroSettings, sizes: Sizes, size: _Bytes, activations: Activations, image: int
) -> dict[str, int]:
    batch = config.evaluate.batch
    own = {"images": batch * image, "activations": activations.evaluation(batch)}
    return {**own, **_whole(settings, sizes), **_lasting(settings, size)}


def _only_present(kinds: dict[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in kinds.items() if size}
