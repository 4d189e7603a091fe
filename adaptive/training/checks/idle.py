"""Settings that change nothing in the configuration that they stand in: refused where a method was meant, else told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from adaptive.config.base import ConfigSection
from adaptive.config.sections import Config, DataConfig, DistillationConfig, TrackingConfig, TrainConfig
from adaptive.data.remote.pipes import PIPE
from adaptive.data.remote.urls import is_remote
from adaptive.errors import ConfigError
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.batch import BatchSizes
from adaptive.training.phases import PhasePlan
from adaptive.training.spikes import ENOUGH

FAST_BF16 = ("amx_bf16", "avx512_bf16")  # processor features without which bf16 is emulated


def check_methods_act(config: Config, exits: int, plans: Sequence[PhasePlan]) -> None:
    """Refuse a training method that no phase has a use for (raises ConfigError)."""
    train, distillation = config.train, config.distillation
    early = any(any(plan.exit_weights[:-1]) for plan in plans)
    if distillation.gamma > 0 and not any(_is_taught(distillation, plan) for plan in plans):
        off = not any(plan.gamma for plan in plans)
        why = "every phase has distillation: false" if off else (
            f"teacher {distillation.teacher!r} teaches the early exits, and no phase counts the loss of one"
        )  # fmt: skip
        raise ConfigError(f"distillation.gamma = {distillation.gamma:g} does nothing: {why}; use distillation.gamma=0")
    if train.exit_drop and not early:
        raise ConfigError(
            f"train.exit_drop = {train.exit_drop:g} does nothing: no phase counts the loss of an early exit, and the "
            "last is never left out; use train.exit_drop=0"
        )
    several = any(plan.surgery and sum(map(bool, plan.exit_weights)) > 1 for plan in plans)
    if train.gradient_surgery != "none" and not several:
        raise ConfigError(
            f"train.gradient_surgery = {train.gradient_surgery!r} does nothing: in no phase do the losses of two exits "
            "reach parameters that they share; use train.gradient_surgery=none"
        )
    for number, plan in enumerate(plans):
        if plan.reset and plan.learn == "early_exits":
            raise ConfigError(
                f"phases.{number}.reset_classifiers = True gives the last exit a fresh linear layer too, which does "
                "not learn with learn: early_exits; use learn: exits, or reset_classifiers: false"
            )
    if exits == 1:
        for key, value in _changed(config.model, "head_width", "head_dropout"):
            raise ConfigError(
                f"model.{key} = {value} does nothing: it is for early exits, and the one exit is the backbone's own; "
                f"use model.{key}=0"
            )


def idle_notes(
    config: Config,
    batch: BatchSizes,
    network: AdaptiveNetwork,
    plans: Sequence[PhasePlan],
    steps_per_epoch: int,
    device: str | None,
) -> list[str]:
    """Return a line for every setting that another one leaves without use, and for precisions that are emulated."""
    model, train, exits = config.model, config.train, len(network.exits)
    notes = [*_about_distillation(config.distillation), *_about_data(config.data), *_about_precision(config, device)]
    notes += [*_about_phases(config, plans, steps_per_epoch), *_about_tracking(config.tracking)]
    if not config.optimizer.decay_norm_and_bias and not config.optimizer.weight_decay:
        notes.append("optimizer.decay_norm_and_bias = False does nothing: optimizer.weight_decay = 0")
    if exits == 1:
        chosen = {"collaboration": model.collaboration, "equilibrium": model.equilibrium}
        for key, value in chosen.items():
            if isinstance(value, str):
                notes.append(f"model.{key} = {value!r} does nothing: the network has one exit")
        if any(plan.last_only_epochs for plan in plans):
            notes.append(f"train.last_only_epochs = {train.last_only_epochs:g} does nothing: the network has one exit")
    if model.sync_batchnorm and batch.world == 1:
        notes.append("model.sync_batchnorm = True does nothing on one rank")
    elif model.sync_batchnorm and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
        notes.append(f"model.sync_batchnorm = True does nothing: {model.backbone} has no BatchNorm")
    if model.equilibrium not in (True, False) and not any(plan.equilibrium for plan in plans):
        notes.append(f"model.equilibrium = {model.equilibrium!r} does nothing: every phase switches it off")
    return notes


def _is_taught(distillation: DistillationConfig, plan: PhasePlan) -> bool:
    """Whether an exit whose loss counts has a teacher in a phase."""
    students = plan.exit_weights if distillation.teacher == "model" else plan.exit_weights[:-1]
    return plan.gamma > 0 and any(students)


def _changed(section: ConfigSection, *keys: str) -> Iterator[tuple[str, object]]:
    """Yield those of the keys whose value is not the default."""
    for key in keys:
        field = type(section).model_fields[key]
        if (value := getattr(section, key)) != field.get_default(call_default_factory=True):
            yield key, value


def _about_distillation(section: DistillationConfig) -> Iterator[str]:
    if not section.gamma:
        for key, value in _changed(section, "temperature", "teacher", "teacher_model", "reduction"):
            yield f"distillation.{key} = {value!r} does nothing: distillation.gamma = 0 switches distillation off"
    elif section.teacher != "model":
        for key, value in _changed(section, "teacher_model", "teacher_weights", "teacher_options"):
            yield f"distillation.{key} = {value!r} does nothing with distillation.teacher = {section.teacher!r}"


def _about_phases(config: Config, plans: Sequence[PhasePlan], steps_per_epoch: int) -> Iterator[str]:
    """Yield what every phase overrides, and what comes to nothing within one."""
    if config.phases:
        overridden = {
            "train.epochs": ("epochs", config.train.epochs, TrainConfig.model_fields["epochs"].default),
            "train.exit_weights": ("exit_weights", config.train.exit_weights, None),
            "train.last_only_epochs": ("last_only_epochs", config.train.last_only_epochs, 0),
        }
        for key, (own, value, default) in overridden.items():
            if value != default and all(getattr(phase, own) is not None for phase in config.phases):
                yield f"{key} = {value!r} does nothing: every phase has its own {own}"
    for number, plan in enumerate(plans):
        if plan.last_only_epochs and not round(plan.last_only_epochs * steps_per_epoch):
            yield f"last_only_epochs = {plan.last_only_epochs:g} does nothing in phase {plan.name!r}: below a step"
        if config.phases and config.phases[number].equilibrium and plan.learn not in ("all", "backbone"):
            yield f"phases.{number}.equilibrium = True does nothing: no block learns with learn: {plan.learn}"
    steps = max(plan.epochs for plan in plans) * steps_per_epoch
    if config.train.spike_sigma and steps <= ENOUGH:
        yield f"train.spike_sigma = {config.train.spike_sigma:g} does nothing in {steps} steps: the first {ENOUGH} pass"


def _about_tracking(tracking: TrackingConfig) -> Iterator[str]:
    """Yield, where nothing is sent to W&B, the settings of what would be shown there: a line for all."""
    if tracking.wandb == "disabled":
        keys = ("entity", "name", "group", "job_type", "checkpoints", "alerts", "tags", "init_timeout", "project")
        if changed := [f"tracking.{key}" for key, _ in _changed(tracking, *keys)]:
            yield f"{', '.join(changed)}: W&B shows nothing of this run, tracking.wandb = 'disabled'"


def _about_data(data: DataConfig) -> Iterator[str]:
    if data.crop != "resize":
        for key, value in _changed(data, "crop_scale", "crop_ratio", "eval_crop"):
            if key != "eval_crop" or value != 1.0:  # all of the image is what these crops keep
                yield f"data.{key} = {value!r} does nothing with data.crop = {data.crop!r}"
    if data.crop != "pad":
        for key, value in _changed(data, "crop_padding"):
            yield f"data.{key} = {value!r} does nothing with data.crop = {data.crop!r}"
    if data.auto_augment and data.color_jitter:
        yield f"data.color_jitter = {data.color_jitter:g} does nothing: data.auto_augment replaces it"
    if not is_remote(data.path):
        for key, value in _changed(data, "cache", "cache_gib", "cache_ahead", "attempts", "timeout"):
            yield f"data.{key} = {value!r} does nothing: it is for URLs, and data.path is a folder"
    if data.pipe and not data.path.startswith(PIPE):
        yield f"data.pipe = True does nothing: data.path = {data.path!r} is no pipe:COMMAND"


def _about_precision(config: Config, device: str | None) -> Iterator[str]:
    precision = config.train.precision
    if precision == "fp32":
        return
    kind = "cpu" if config.train.device == "cpu" else device
    if kind == "cpu" and precision == "fp16":
        yield "train.precision = 'fp16' is slow on a CPU, a hundred times at worst; use bf16 or fp32"
    elif kind == "cpu" and not _computes_bf16():
        yield "train.precision = 'bf16' is emulated by this processor, which is slow; use fp32"
    elif kind == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        yield "train.precision = 'bf16' is emulated by this GPU, which is slow; use fp16"


def _computes_bf16() -> bool:
    """Whether this processor multiplies in bf16; True where it does not say."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return True
    return not flags or any(name in flags for name in FAST_BF16)
