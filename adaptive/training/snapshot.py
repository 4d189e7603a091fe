"""What a checkpoint holds, gathered from the ranks and given back to them; every rank takes part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaptive.networks.network import AdaptiveNetwork
from adaptive.training import optimizer_state
from adaptive.training.ema import ExponentialAverage
from adaptive.training.engine import Engine, all_reduce

RUNNING = ("running_mean", "running_var")


@dataclass
class Learner:
    """What changes while a phase learns: the engine with its network, the moving average, the frozen teacher."""

    engine: Engine
    network: AdaptiveNetwork
    average: ExponentialAverage | None
    frozen: nn.Module | None


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


def whole_weights(engine: Engine, network: AdaptiveNetwork) -> dict[str, Tensor]:
    """Return the network's whole state on the CPU, running statistics averaged over ranks (collective)."""
    weights: dict[str, Tensor] = {}
    for part, prefix in _parts(network):
        with engine.gathered(list(part.parameters())):
            for name, tensor in part.state_dict(prefix=prefix).items():
                weights[name] = tensor.detach().cpu().clone()
    for name, tensor in averaged_statistics(network).items():
        weights[name] = tensor.cpu()
    return weights


def average_weights(average: ExponentialAverage) -> dict[str, Tensor]:
    """Return the moving average's state on the CPU, running statistics averaged over ranks (collective)."""
    state = {name: tensor.detach().cpu() for name, tensor in average.network.state_dict().items()}
    return state | {name: t.cpu() for name, t in averaged_statistics(average.network).items()}


def capture(learner: Learner) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Gather everything that a resumed run needs (collective): tensors by file, and plain values."""
    engine = learner.engine
    optimizer, scalars = optimizer_state.gather(engine)
    tensors = {"weights": whole_weights(engine, learner.network), "optimizer": optimizer}
    statistics = _from_all_ranks(running_statistics(learner.network).values(), "network")
    state: dict[str, Any] = {"optimizer": scalars, "loss_scale": engine.loss_scale_state()}
    if learner.average is not None:
        tensors["ema"] = average_weights(learner.average)
        statistics |= _from_all_ranks(running_statistics(learner.average.network).values(), "ema")
        state["ema_updates"] = learner.average.updates
    if learner.frozen is not None:
        tensors["teacher"] = {k: t.detach().cpu() for k, t in learner.frozen.state_dict().items()}
    if statistics:
        tensors["statistics"] = statistics
    return tensors, state


def restore(learner: Learner, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Give back all but the network's weights, which are loaded before the engine is built."""
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
