"""The learning rate that a schedule will really take over a run, compared with what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from adaptive.config.sections import Config, ScheduleConfig
from adaptive.errors import ConfigError
from adaptive.training.optimizer import build_scheduler
from adaptive.training.phases import PhasePlan

SAMPLES = 500  # points of a curve besides those at which it may jump


def learning_rates(schedule: ScheduleConfig, plan: PhasePlan, steps: int, at: Sequence[int]) -> list[float]:
    """Return the learning rate of a phase before each of these updates, counted from its start (ConfigError)."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.lr)
    scheduler = build_scheduler(optimizer, schedule, plan.lr, plan.epochs, steps)
    found = []
    for update in at:
        scheduler.step_update(update)
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


def check_schedule(config: Config, plans: Sequence[PhasePlan], steps: int) -> list[str]:
    """Refuse a learning rate that goes where a schedule does not mean it to; return notes on keys without effect.

    Raises:
        ConfigError: the rate falls in the warm-up or rises after it, or a milestone does not decay it once.
    """
    for i, plan in enumerate(plans):
        own = bool(config.phases) and config.phases[i].lr is not None
        _check_course(config.schedule, plan, steps, f"phases.{i}.lr" if own else "optimizer.lr")
        if config.schedule.name == "multistep":
            _check_milestones(config.schedule, plan, steps)
    return _without_effect(config.schedule, plans, steps)


def _check_course(schedule: ScheduleConfig, plan: PhasePlan, steps: int, lr_key: str) -> None:
    """Refuse a warm-up that cools down, and a decay that rises."""
    updates, warm = plan.epochs * steps, round(schedule.warmup_epochs * steps)
    points = _points(schedule, updates, steps)
    rates = learning_rates(schedule, plan, steps, points)
    lr = f"{lr_key} = {plan.lr:g} of phase {plan.name!r}"
    if warm and schedule.warmup_lr > plan.lr:
        raise ConfigError(f"schedule.warmup_lr = {schedule.warmup_lr:g} lies above {lr}; use a lower one")
    for (here, before), (_, after) in pairwise(zip(points, rates, strict=True)):
        if here >= warm and after > before * (1 + 1e-9):
            key = "min_lr" if schedule.min_lr > plan.lr else "decay_rate"
            bound = f"at most {lr}" if key == "min_lr" else "at most 1"
            raise ConfigError(
                f"schedule.{key} = {getattr(schedule, key):g} makes the learning rate rise from {before:.3g} to "
                f"{after:.3g}; give {bound}"
            )


def _check_milestones(schedule: ScheduleConfig, plan: PhasePlan, steps: int) -> None:
    """Refuse a milestone at which the rate is not decayed, or decayed more than once."""
    updates, rate = plan.epochs * steps, schedule.decay_rate
    for share in schedule.milestones:
        update = round(share * updates)
        inside = 0 < update < updates
        before, after = learning_rates(schedule, plan, steps, [update - 1, update]) if inside else (1.0, 0.0)
        if not inside or abs(after - before * rate) > 1e-9 * before:
            raise ConfigError(
                f"schedule.milestones = {schedule.milestones}: at {share:g} of phase {plan.name!r} the learning rate "
                f"is not multiplied by schedule.decay_rate = {rate:g} once; give rising shares between 0 and 1, behind "
                "the warm-up and a step apart"
            )


def _without_effect(schedule: ScheduleConfig, plans: Sequence[PhasePlan], steps: int) -> list[str]:
    """Return a note for every key whose default would give the same rates, and for a decay that never comes."""
    notes = []
    for key, field in ScheduleConfig.model_fields.items():
        value = getattr(schedule, key)
        if key == "name" or value == field.default:
            continue
        other = schedule.model_copy(update={key: field.default})
        if all(_curve(schedule, plan, steps, other) == _curve(other, plan, steps, schedule) for plan in plans):
            notes.append(
                f"schedule.{key} = {value!r} does nothing with schedule.name = {schedule.name!r} as it is set here: "
                f"the learning rate is that of the default, {field.default!r}"
            )
    if schedule.name in ("step", "multistep"):
        constant = schedule.model_copy(update={"name": "constant"})
        if all(_curve(schedule, plan, steps, constant) == _curve(constant, plan, steps, schedule) for plan in plans):
            notes.append(
                f"schedule.name = {schedule.name!r} never decays the learning rate here: schedule.decay_epochs = "
                f"{schedule.decay_epochs:g}, schedule.decay_rate = {schedule.decay_rate:g}, and the longest phase has "
                f"{max(plan.epochs for plan in plans)} epochs"
            )
    return notes


def _curve(schedule: ScheduleConfig, plan: PhasePlan, steps: int, other: ScheduleConfig) -> list[float]:
    updates = plan.epochs * steps
    points = sorted({*_points(schedule, updates, steps), *_points(other, updates, steps)})
    return learning_rates(schedule, plan, steps, points)


def _points(schedule: ScheduleConfig, updates: int, steps: int) -> list[int]:
    """Return updates that show a curve's shape: even ones, and those around its jumps."""
    jumps = [round(schedule.warmup_epochs * steps), *(round(share * updates) for share in schedule.milestones)]
    decay = max(1, round(schedule.decay_epochs * steps))
    jumps += range(decay, updates, max(decay, updates // SAMPLES // decay * decay))
    around = {jump + offset for jump in jumps for offset in (-1, 0, 1)}
    even = np.linspace(0, updates - 1, min(updates, SAMPLES)).astype(int).tolist()
    return sorted(update for update in {*around, *even} if 0 <= update < updates)
