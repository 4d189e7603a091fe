"""A snapshot of training: gathered from all ranks for a checkpoint, and restored from one; every rank takes part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.checkpoints import optimizer_state
from adaptive.training.checkpoints.cpu_copy import cpu_copy
from adaptive.training.ema import ExponentialAverage
from adaptive.training.engine.engine import Engine
from adaptive.training.engine.group import all_reduce
from adaptive.training.learner import Learner

RUNNING = ("running_mean", "running_var")


def running_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return BatchNorm's running means and variances by name; they differ between ranks while training."""
    return {name: b for name, b in network.named_buffers() if name.rpartition(".")[2] in RUNNING}


def averaged_statistics(network: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics averaged over all ranks, leaving each rank's own as they are (collective)."""
    own = running_statistics(network)
    if not own:
        return {}
    world = dist.get_world_size() if dist.is_initialized() else 1
    flat = all_reduce(torch.cat([b.detach().double().flatten() for b in own.values()])) / world
    averaged = {}
    for name, buffer in own.items():
        part, flat = flat[: buffer.numel()], flat[buffer.numel() :]
        averaged[name] = part.view_as(buffer).to(buffer.dtype)
    return averaged


@contextmanager
def with_averaged_statistics(network: nn.Module) -> Iterator[None]:
    """Measure with BatchNorm statistics averaged over the ranks, then go on with each rank's own (collective)."""
    buffers = running_statistics(network)
    own = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        for name, value in averaged_statistics(network).items():
            buffers[name].copy_(value)
        yield
    finally:
        for name, value in own.items():
            buffers[name].copy_(value)


def whole_weights(engine: Engine, network: AdaptiveNetwork, keep: bool = True) -> dict[str, Tensor]:
    """Return a copy of the network's whole state on the CPU, running statistics averaged over ranks (collective).

    With ``keep`` off this rank takes part and copies nothing.
    """
    weights: dict[str, Tensor] = {}
    for part, prefix in _parts(network):
        with engine.gathered(list(part.parameters())):
            weights |= _copies(part, prefix) if keep else {}
    return weights | _averaged_copies(network, keep)


def average_weights(average: ExponentialAverage, keep: bool = True) -> dict[str, Tensor]:
    """Return a copy of the moving average's state on the CPU, statistics averaged over ranks (collective)."""
    return (_copies(average.network) if keep else {}) | _averaged_copies(average.network, keep)


def _copies(part: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Copy all but the running statistics, whose average over the ranks is taken instead."""
    state = part.state_dict(prefix=prefix).items()
    return {name: cpu_copy(tensor) for name, tensor in state if name.rpartition(".")[2] not in RUNNING}


def _averaged_copies(network: nn.Module, keep: bool) -> dict[str, Tensor]:
    averaged = averaged_statistics(network)
    return {name: cpu_copy(tensor) for name, tensor in averaged.items()} if keep else {}


def capture(learner: Learner, keep: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Gather everything that a resumed run needs (collective): tensors by file, and plain values.

    The tensors are copies on the CPU: training may go on. With ``keep`` off this rank takes part and copies nothing, so
    that only the rank that writes spends the memory.
    """
    engine = learner.engine
    optimizer, scalars = optimizer_state.gather(engine, keep)
    tensors = {"weights": whole_weights(engine, learner.network, keep), "optimizer": optimizer}
    statistics = _from_all_ranks(running_statistics(learner.network).values(), "network")
    state: dict[str, Any] = {"optimizer": scalars, "loss_scale": engine.loss_scale_state()}
    if learner.average is not None:
        tensors["ema"] = average_weights(learner.average, keep)
        statistics |= _from_all_ranks(running_statistics(learner.average.network).values(), "ema")
        state["ema_updates"] = learner.average.updates
    if learner.frozen is not None and keep:
        tensors["teacher"] = {name: cpu_copy(tensor) for name, tensor in learner.frozen.state_dict().items()}
        state["teacher_collaboration"] = learner.frozen.collaboration
    if statistics:
        tensors["statistics"] = statistics
    return tensors, state


def restore(learner: Learner, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Load all but the network's weights, which are loaded before the engine is built."""
    optimizer_state.scatter(learner.engine, tensors["optimizer"], state["optimizer"])
    learner.engine.load_loss_scale_state(state["loss_scale"])
    statistics = tensors.get("statistics", {})
    _to_this_rank(running_statistics(learner.network).values(), statistics, "network")
    if learner.average is not None and tensors.get("ema"):
        learner.average.network.load_state_dict(tensors["ema"])
        learner.average.updates = int(state["ema_updates"])
        _to_this_rank(running_statistics(learner.average.network).values(), statistics, "ema")


def _parts(network: AdaptiveNetwork) -> Iterable[tuple[nn.Module, str]]:
    for group in ("blocks", "exits"):
        for i, part in enumerate(getattr(network, group)):
            yield part, f"{group}.{i}."


def _from_all_ranks(buffers: Iterable[Tensor], name: str) -> dict[str, Tensor]:
    """Running statistics are each rank's own; an exact resume needs every rank's, not their mean."""
    own = list(buffers)
    if not own or not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    flat = torch.cat([b.detach().flatten().float() for b in own])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return {f"{name}/rank_{rank}": values.cpu() for rank, values in enumerate(everyone)}


def _to_this_rank(buffers: Iterable[Tensor], statistics: dict[str, Tensor], name: str) -> None:
    """Take this rank's own statistics back where the number of ranks is the same; else the averaged ones stay."""
    saved = [key for key in statistics if key.startswith(f"{name}/rank_")]
    if not saved or not dist.is_initialized() or len(saved) != dist.get_world_size():
        return
    flat = statistics[f"{name}/rank_{dist.get_rank()}"]
    for buffer in buffers:
        part, flat = flat[: buffer.numel()], flat[buffer.numel() :]
        buffer.copy_(part.view_as(buffer))
