"""Optimizer state as whole tensors per parameter, whatever the ZeRO stage and number of ranks.

A checkpoint in this form loads at any stage and on any number of ranks. Gathering is collective: every rank calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adaptive.errors import CheckpointError
from adaptive.training.checkpoints.cpu_copy import cpu_copy
from adaptive.training.engine.engine import Engine

# Settings of a parameter group that come from the configuration or the schedule, not from training.
GROUP_SETTINGS = frozenset({"params", "names", "lr", "initial_lr", "lr_scale", "weight_decay"})


def gather(engine: Engine, keep: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, scalars): tensors are keyed ``parameter|state``, copies on the CPU; scalars are JSON-able.

    With ``keep`` off this rank takes part and copies no tensor.
    """
    _link_states(engine)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in _learning(engine):
        for key, value in _state_of(engine, parameter).items():
            if isinstance(value, Tensor):
                full = _full_state(engine, parameter, key, value) if value.ndim > 0 else value
                if keep:
                    # What was gathered from ranks is a tensor of its own already; all else changes with the next step.
                    own = full is not value and not full.is_cuda
                    tensors[f"{name}|{key}"] = full.detach().contiguous() if own else cpu_copy(full)
            elif value is not None:
                numbers.setdefault(name, {})[key] = value
    groups = [{k: v for k, v in group.items() if _is_progress(k, v)} for group in engine.optimizer.param_groups]
    return tensors, {"numbers": numbers, "groups": groups}


def scatter(engine: Engine, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
    """Load what ``gather`` returned into a fresh engine (raises CheckpointError where it does not fit)."""
    groups = engine.optimizer.param_groups
    if len(groups) != len(scalars["groups"]):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(scalars['groups'])} parameter groups, this run's {len(groups)}; "
            "optimizer or phases differ from the run that wrote it"
        )
    for group, saved in zip(groups, scalars["groups"], strict=True):
        group.update(saved)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, state = key.rpartition("|")
        by_parameter.setdefault(name, {})[state] = tensor
    learning = dict(_learning(engine))
    unknown = sorted(set(by_parameter) - set(learning))
    if unknown:
        raise CheckpointError(f"the checkpoint holds optimizer state of {unknown[0]}, which does not learn in this run")
    for name, parameter in learning.items():
        _create_state(engine, parameter, by_parameter.get(name, {}), scalars["numbers"].get(name, {}))
    _link_states(engine)
    for name, parameter in learning.items():
        for key, tensor in by_parameter.get(name, {}).items():
            if tensor.ndim > 0:
                _set_full_state(engine, parameter, key, tensor)


def _learning(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    return ((n, p) for n, p in engine.network.named_parameters() if p.requires_grad)


def _is_progress(key: str, value: Any) -> bool:
    """Some optimizers count their steps in the group; what else is plain there is a setting and harmless to keep."""
    if key in GROUP_SETTINGS:
        return False
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _link_states(engine: Engine) -> None:
    """Point every parameter at its slice of the flat state (ZeRO 1 and 2).

    DeepSpeed does so once, after the first group's first step, when later groups have no state yet.
    """
    if engine.stage in (1, 2):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _flat_owner(engine: Engine, parameter: nn.Parameter) -> Tensor | None:
    """Return the tensor under which the inner optimizer keeps this parameter's state on this rank."""
    if engine.stage == 0:
        return parameter
    optimizer = engine.optimizer
    if engine.stage == 3:
        group, _, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return optimizer.fp32_partitioned_groups_flat[group]
    for group, members in enumerate(optimizer.bit16_groups):
        if any(member is parameter for member in members):
            return optimizer.single_partition_of_fp32_groups[group]
    return None


def _inner(engine: Engine) -> torch.optim.Optimizer:
    return engine.optimizer if engine.stage == 0 else engine.optimizer.optimizer


def _state_of(engine: Engine, parameter: nn.Parameter) -> dict[str, Any]:
    owner = _flat_owner(engine, parameter)
    return dict(_inner(engine).state.get(owner, {})) if owner is not None else {}


def _full_state(engine: Engine, parameter: nn.Parameter, key: str, value: Tensor) -> Tensor:
    if engine.stage == 0:
        return value
    if engine.stage == 3:
        return engine.optimizer.get_full_hp_param(parameter, key)
    return parameter.get_full_hp_param(key)  # type: ignore[attr-defined]


def _create_state(engine: Engine, parameter: nn.Parameter, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Make the inner optimizer's state exist with its final shapes; ZeRO's flat tensors are filled afterwards."""
    owner = _flat_owner(engine, parameter)
    if owner is None or not (tensors or numbers):
        return
    state = _inner(engine).state[owner]
    for key, tensor in tensors.items():
        if tensor.ndim == 0:
            state[key] = tensor.clone().to(_scalar_device(engine, owner))
        elif engine.stage == 0:
            state[key] = tensor.clone().to(parameter.device)
        elif key not in state:
            state[key] = torch.zeros_like(owner, dtype=tensor.dtype)
    state.update(numbers)


def _scalar_device(engine: Engine, owner: Tensor) -> torch.device:
    """Torch keeps step counts on the CPU unless a fused or capturable implementation wants them beside the tensor."""
    group = engine.optimizer.param_groups[0]
    return owner.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def _set_full_state(engine: Engine, parameter: nn.Parameter, key: str, tensor: Tensor) -> None:
    if engine.stage == 0:
        return
    if engine.stage in (1, 2):
        parameter.set_full_hp_param(tensor.to(engine.device), key)  # type: ignore[attr-defined]
        return
    optimizer = engine.optimizer
    mine, _ = optimizer._get_fp32_opt_state_partition(parameter, release_swap_buffers=False, optim_state_key=key)
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank = optimizer._get_param_partition_rank(parameter)
    flat = tensor.flatten()[rank * size : (rank + 1) * size]
    # The last rank's partition may reach beyond the parameter's end; that padding carries no state.
    mine[: flat.numel()].copy_(flat)
