"""Parameter groups, timm's optimizers and schedules, and which of them fit ZeRO."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler

from adaptive.config.sections import OptimizerConfig, ScheduleConfig
from adaptive.errors import ConfigError, nearest
from adaptive.networks.network import AdaptiveNetwork

# Optimizers whose update of one number depends on that number's own history alone. ZeRO hands an optimizer flat
# slices of many tensors; whoever takes norms or factors over a tensor would take them over the wrong one.
ELEMENTWISE = frozenset(
    {
        "sgd",
        "momentum",
        "nesterov",
        "sgdw",
        "nesterovw",
        "adam",
        "adamw",
        "adamwlegacy",
        "nadam",
        "nadamw",
        "nadamlegacy",
        "radam",
        "radamw",
        "radamlegacy",
        "adamax",
        "adabelief",
        "radabelief",
        "adadelta",
        "adagrad",
        "rmsprop",
        "rmsproptf",
        "rmsproptfw",
        "lion",
        "adan",
        "adanw",
        "madgrad",
        "madgradw",
        "laprop",
    }
)

# A step of these does not depend on the gradient's scale, so Gradient Equilibrium's rescaling cancels almost wholly.
SCALE_DEPENDENT = frozenset({"sgd", "momentum", "nesterov", "sgdw", "nesterovw", "sgdp", "sgdc"})


def is_scale_invariant(name: str) -> bool:
    """Tell whether an optimizer's step ignores the scale of the gradient (all but the SGD family)."""
    return name.lower() not in SCALE_DEPENDENT


def check_optimizer(config: OptimizerConfig, zero_stage: int) -> None:
    """Refuse unknown optimizers, and under ZeRO those that need whole tensors (raises ConfigError)."""
    name = config.name.lower()
    known = list_optimizers(exclude_filters=["fused*", "bnb*"])
    if name not in known:
        remedy = nearest(name, known, f"known: {', '.join(known)}")
        raise ConfigError(f"optimizer.name = {config.name!r} is no timm optimizer; {remedy}")
    if zero_stage and name not in ELEMENTWISE:
        raise ConfigError(
            f"optimizer.name = {config.name!r} needs whole tensors, which train.zero_stage = {zero_stage} flattens and "
            f"splits; use train.zero_stage=0, or one of: {', '.join(sorted(ELEMENTWISE & set(known)))}"
        )


def parameter_groups(network: AdaptiveNetwork, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Group the learning parameters by weight decay and layer-wise learning rate scale.

    Groups of equal settings are one group and none is empty. A backbone parameter of layer l out of L has
    ``lr_scale`` = layer_decay^(L - 1 - l) (BEiT, arXiv 2106.08254); added exits and links have 1.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    last = max(network.num_layers - 1, 0)
    never_decays = network.no_weight_decay()
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or name.endswith(".bias") or name in never_decays
        decays = config.decay_norm_and_bias or not spared
        weight_decay = config.weight_decay if decays else 0.0
        scale = config.layer_decay ** (last - network.layer_ids.get(name, last))
        group = groups.setdefault(
            (weight_decay, scale), {"params": [], "weight_decay": weight_decay, "lr_scale": scale, "names": []}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ConfigError("nothing learns in this phase: every parameter is frozen; check phases.*.learn")
    return list(groups.values())


def build_optimizer(network: AdaptiveNetwork, config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Build timm's optimizer of that name over the network's learning parameters."""
    groups = parameter_groups(network, config)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    return make_optimizer(groups, config, lr)


def timm_name(config: OptimizerConfig) -> str:
    """Return timm's name of the optimizer: its "sgd" is Nesterov SGD, its "momentum" the plain kind."""
    name = config.name.lower()
    return "momentum" if name == "sgd" and not config.nesterov else name


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """Build timm's optimizer over groups of parameters (raises ConfigError that names the key at fault)."""
    try:
        return create_optimizer_v2(
            groups, opt=timm_name(config), lr=lr, weight_decay=config.weight_decay, momentum=config.momentum,
            **config.options,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{_at_fault(config, str(error))} does not fit {config.name}: {error}") from None


def _at_fault(config: OptimizerConfig, message: str) -> str:
    """Return the key, with its value, that an optimizer's complaint is about."""
    for key in config.options:
        if key in message:
            return f"optimizer.options = {config.options}"
    words = {"momentum": "momentum", "learning rate": "lr", "weight_decay": "weight_decay"}
    for word, key in words.items():
        if word in message:
            return f"optimizer.{key} = {getattr(config, key):g}"
    return f"optimizer.options = {config.options}"


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: ScheduleConfig, lr: float, epochs: int, steps_per_epoch: int
) -> Scheduler:
    """Build timm's schedule over ``epochs * steps_per_epoch`` updates; drive it with ``step_update(updates)``."""
    if config.warmup_epochs >= epochs and config.warmup_epochs > 0:
        raise ConfigError(f"schedule.warmup_epochs = {config.warmup_epochs} must be below the phase's {epochs} epochs")
    for group in optimizer.param_groups:
        group["initial_lr"] = lr  # the scheduler multiplies by the group's lr_scale itself
    # timm counts in epochs and turns them into updates by multiplication; with one "epoch" per update fractions of an
    # epoch stay exact.
    updates = epochs * steps_per_epoch
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.name,
        num_epochs=updates,
        decay_epochs=max(1, round(config.decay_epochs * steps_per_epoch)),
        # timm decays one update before a milestone is reached.
        decay_milestones=[round(share * updates) + 1 for share in config.milestones],
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=round(config.warmup_epochs * steps_per_epoch),
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    return scheduler
