"""An optimizer as it is built and as it steps, compared with what the configuration asks of it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.optim import get_optimizer_class, get_optimizer_info
from torch import Tensor, nn

from adaptive.config.sections import Config, OptimizerConfig
from adaptive.errors import ConfigError, nearest, reason_of
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.optimizer import build_optimizer, make_optimizer, timm_name
from adaptive.training.phases import PhasePlan

# Arguments of timm's create_optimizer_v2 that a section owns, or that act on a whole model and not on groups.
OWNED = {
    "opt": "optimizer.name",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "momentum": "optimizer.momentum",
    "nesterov": "optimizer.nesterov",
    "layer_decay": "optimizer.layer_decay",
    "filter_bias_and_bn": "optimizer.decay_norm_and_bias",
}
OF_MODELS = ("layer_decay_min_scale", "layer_decay_no_opt_scale", "fallback_list", "fallback_no_weight_decay",
             "param_group_fn", "model_or_params", "params")  # fmt: skip
LEARN_THE_BACKBONE = ("all", "backbone")


def check_optimizer_acts(config: Config, network: AdaptiveNetwork, plans: list[PhasePlan]) -> None:
    """Refuse an optimizer that cannot be driven, and settings that do not reach it (raises ConfigError).

    It is built over the network for every phase's rate, and takes a few steps on small tensors.
    """
    asked = config.optimizer
    _check_options(asked)
    for plan in plans:
        _check_groups(asked, build_optimizer(network, asked, plan.lr), plan.lr)
    if asked.layer_decay < 1:
        _check_layer_decay(config, network, plans)
    moved = _trial(asked)
    if torch.equal(moved, _trial(asked, lr=2 * TRIAL_LR)):
        raise ConfigError(
            f"optimizer.lr = {asked.lr:g} and the schedule do nothing with optimizer.name = {asked.name!r} and "
            f"optimizer.options = {asked.options}: the step does not depend on the rate; change the options"
        )
    if asked.weight_decay and torch.equal(moved, _trial(asked, weight_decay=2 * TRIAL_DECAY)):
        raise ConfigError(
            f"optimizer.weight_decay = {asked.weight_decay:g} does nothing with optimizer.name = {asked.name!r} and "
            f"optimizer.options = {asked.options}; set it to 0, or change the options"
        )


def optimizer_notes(config: OptimizerConfig) -> list[str]:
    """Return what a user has to expect of an optimizer before its first step is done, a line each."""
    if timm_name(config).removeprefix("c").startswith("kron"):
        slow = "compiles its update for every shape of a parameter (torch.compile): the first steps take minutes"
        return [f"optimizer.name = {config.name!r} {slow}, which train.startup_timeout has to allow"]
    return []


def _check_options(config: OptimizerConfig) -> None:
    """Refuse options that another key owns, or that the optimizer does not take."""
    name = timm_name(config)
    info, kind = get_optimizer_info(name), get_optimizer_class(name, bind_defaults=False)
    known = [p for p in inspect.signature(kind).parameters if p not in ("params", *OWNED, "self")]
    dropped = {"eps": not info.has_eps, "betas": not info.has_betas}
    whole = f"optimizer.options = {config.options}"
    if config.nesterov and not config.momentum:
        raise ConfigError("optimizer.momentum = 0 with optimizer.nesterov = True: give a momentum, such as 0.9")
    for key in config.options:
        own = OWNED.get(key)
        if (
            own
            and not (key == "momentum" and not info.has_momentum)
            and not (key == "nesterov" and config.name.lower() != "sgd")
        ):
            raise ConfigError(f"{whole}: {key} is set by {own}; remove it from the options")
        if key in OF_MODELS:
            raise ConfigError(f"{whole}: {key} does nothing here, where groups of parameters are made beforehand")
        if key not in inspect.signature(kind).parameters or dropped.get(key, False):
            remedy = nearest(key, known, f"it takes {', '.join(known)}")
            raise ConfigError(
                f"{whole}: {key} does nothing, {kind.__name__} ({config.name}) does not take it; {remedy}"
            )


def _check_groups(config: OptimizerConfig, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Compare the groups of a built optimizer with what was asked for."""
    default = OptimizerConfig.model_fields["momentum"].default
    for group in optimizer.param_groups:
        expected = {"lr": lr * group["lr_scale"], **{key: config.options[key] for key in config.options}}
        if config.momentum != default and "momentum" not in config.options:
            expected["momentum"] = config.momentum
        for key, value in expected.items():
            if key in group and _plain(group[key]) != _plain(value):
                raise ConfigError(
                    f"optimizer.{key if key in OWNED else f'options.{key}'} = {value!r} does not reach "
                    f"{config.name}, which takes {group[key]!r}; leave it out"
                )
        if config.momentum != default and "momentum" not in group:
            raise ConfigError(
                f"optimizer.momentum = {config.momentum:g} does nothing: {config.name} has none; leave it out, or see "
                "optimizer.options={betas: [...]}"
            )


def _check_layer_decay(config: Config, network: AdaptiveNetwork, plans: list[PhasePlan]) -> None:
    value = f"optimizer.layer_decay = {config.optimizer.layer_decay:g} does nothing"
    if network.num_layers < 2:
        raise ConfigError(f"{value}: timm knows no layers of {config.model.backbone}; use optimizer.layer_decay=1")
    if not any(plan.learn in LEARN_THE_BACKBONE for plan in plans):
        raise ConfigError(f"{value}: the backbone learns in no phase; use optimizer.layer_decay=1")


TRIAL_LR, TRIAL_DECAY = 0.1, 0.25


def _trial(config: OptimizerConfig, lr: float = TRIAL_LR, weight_decay: float = TRIAL_DECAY) -> Tensor:
    """Return small tensors after three steps, flat, as the loop takes them: finished gradients and no closure."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (6,), (4, 3, 3, 3))
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    group: dict[str, Any] = {"params": parameters, "lr": lr, "weight_decay": weight_decay}
    options = {key: value for key, value in config.options.items() if key != "capturable"}  # that is for GPUs
    tried = config.model_copy(update={"weight_decay": weight_decay, "options": options})
    optimizer = make_optimizer([group], tried, lr)
    try:
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            for _ in range(3):
                for parameter in parameters:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                optimizer.step()
    except Exception as error:
        raise ConfigError(
            f"optimizer.name = {config.name!r} with optimizer.options = {config.options} cannot be driven here, where "
            f"a step gets finished gradients and no closure ({reason_of(error, 120)}); use another, such as adamw"
        ) from None
    return torch.cat([parameter.detach().reshape(-1) for parameter in parameters])


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
