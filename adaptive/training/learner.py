"""What a phase trains with, built from the configuration: engine, moving average, teacher, losses."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import cast

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from adaptive.config.sections import Config
from adaptive.data.images.transforms import Mixer
from adaptive.metrics import ExitMeter
from adaptive.networks.network import AdaptiveNetwork
from adaptive.networks.precision import autocast
from adaptive.training.ema import ExponentialAverage
from adaptive.training.engine.engine import Engine
from adaptive.training.engine.group import all_reduce
from adaptive.training.engine.settings import deepspeed_config
from adaptive.training.losses.distillation import (
    NetworkTeacher,
    Teacher,
    frozen_teacher,
    last_exit,
    next_exit,
)
from adaptive.training.losses.exit_weights import StepWeights
from adaptive.training.losses.gradient_surgery import GradientSurgery
from adaptive.training.losses.objective import ExitObjective
from adaptive.training.optimizer import build_optimizer, is_scale_invariant
from adaptive.training.phases import PhasePlan, prepare_phase, reset_classifiers
from adaptive.training.prepared_run import Setup
from adaptive.training.task import ClassificationTask

COLLECTIVE_TIMEOUT = 1800.0


def collective_timeout(config: Config) -> float:
    """Return the seconds after which a collective operation fails: later than the watchdog, which says more."""
    train = config.train
    return max(COLLECTIVE_TIMEOUT, 60 + max(train.startup_timeout, train.step_timeout, train.save_timeout))


@dataclass
class Learner:
    """A network as one phase trains it: under its engine, with its moving average and its teacher.

    ``frozen`` is the network of a frozen teacher, which checkpoints have to keep.
    """

    engine: Engine
    network: AdaptiveNetwork
    average: ExponentialAverage | None = None
    teacher: Teacher | None = None
    frozen: AdaptiveNetwork | None = None


def build_learner(
    setup: Setup,
    plan: PhasePlan,
    network: AdaptiveNetwork,
    frozen_weights: dict[str, Tensor] | None = None,
    reset_seed: int | None = None,
    links_trained: bool = False,
) -> Learner:
    """Prepare a network for a phase and put it under the engine.

    Args:
        setup: configuration, batch sizes and device.
        plan: the phase.
        network: as it came out of the phase before, or as it was built.
        frozen_weights: a frozen teacher's, from the checkpoint of a run that is continued inside the phase; without
            them the network as it is now becomes the frozen teacher.
        reset_seed: given where a phase begins: the seed of its fresh classifiers, if it wants some.
        links_trained: whether the network was trained with its collaboration links; a frozen teacher reads them then.
    """
    config, train = setup.config, setup.config.train
    # First of all: what follows makes this phase's network of the one that the frozen teacher is a copy of.
    frozen = _snapshot_for_teaching(setup, plan, network, frozen_weights, links_trained)
    prepare_phase(network, plan)
    network = arrange(network, config, setup.device)
    if plan.reset and reset_seed is not None:
        reset_classifiers(network, reset_seed)
    average = ExponentialAverage(network, train.ema_decay) if train.ema_decay else None
    teacher = frozen or _build_teacher(setup, plan, network, average)
    if train.compile:
        network.compile()
    optimizer = build_optimizer(network, config.optimizer, plan.lr)
    engine = Engine(network, optimizer, deepspeed_config(config, setup.batch), collective_timeout(config))
    if train.channels_last and train.zero_stage == 0:
        # Only now: DeepSpeed broadcasts weights as flat bytes. Under ZeRO weights are slices of flat buffers and have
        # to stay as they are; there the images' layout alone makes convolutions run channels-last.
        network.to(memory_format=torch.channels_last)
    return Learner(engine, network, average, teacher, cast(AdaptiveNetwork, frozen.network) if frozen else None)


def arrange(network: AdaptiveNetwork, config: Config, device: torch.device) -> AdaptiveNetwork:
    """Put the network on its device, with synchronised BatchNorm and checkpointing as asked."""
    if config.model.sync_batchnorm:
        network = convert_sync_batchnorm(network)
    network.to(device)
    network.checkpointing = config.train.checkpointing
    return network


def build_task(setup: Setup, plan: PhasePlan, learner: Learner, weights: StepWeights) -> ClassificationTask:
    """Bind the engine's forward pass to the phase's objective, the exits' weights by step, mixing and counting."""
    config, seed, engine = setup.config, setup.config.train.seed, learner.engine
    distillation = config.distillation
    exits = len(plan.exit_weights)
    objective = ExitObjective(
        exits,
        plan.exit_weights,
        plan.gamma,
        distillation.temperature,
        distillation.reduction,
        teach_last=distillation.teacher == "model",
    )
    mixer = Mixer(config.data, learner.network.num_classes, setup.batch.micro_batch)
    meter = ExitMeter(exits, setup.device)
    if not plan.surgery:
        return ClassificationTask(engine, objective, learner.teacher, mixer, meter, seed, weights)
    surgery = GradientSurgery(
        [p for p in engine.network.parameters() if p.requires_grad],
        engine.surrogate,
        all_reduce,
        lambda: engine.loss_scale,
        accumulation=setup.batch.accumulation,
        world=setup.batch.world,
        seed=seed,
    )
    return ClassificationTask(engine.unhooked, objective, learner.teacher, mixer, meter, seed, weights, surgery)


def warn_about_scale_invariance(config: Config) -> str | None:
    """Return the warning for Gradient Equilibrium with an optimizer that cancels it, or None."""
    if not config.model.equilibrium or not is_scale_invariant(config.optimizer.name):
        return None
    text = (
        f"model.equilibrium rescales gradients, but {config.optimizer.name}'s step does not depend on their scale: "
        "it has almost no effect here. Use optimizer.name=sgd, or model.equilibrium=false to silence this"
    )
    warnings.warn(text, stacklevel=2)
    return text


def _snapshot_for_teaching(
    setup: Setup, plan: PhasePlan, network: AdaptiveNetwork, weights: dict[str, Tensor] | None, links_trained: bool
) -> NetworkTeacher | None:
    """Copy the network for distillation.teacher = frozen, answering as the phase before left it; None without it."""
    if plan.gamma == 0 or setup.config.distillation.teacher != "frozen":
        return None
    context = autocast(setup.config.train.precision, setup.device)
    teacher = frozen_teacher(network, links_trained, context)
    if weights:
        teacher.network.load_state_dict(weights)
    teacher.network.to(setup.device)
    return teacher


def _build_teacher(
    setup: Setup, plan: PhasePlan, network: AdaptiveNetwork, average: ExponentialAverage | None
) -> Teacher | None:
    """Return whoever teaches in this phase but for a frozen network; None without distillation."""
    if plan.gamma == 0:
        return None
    kind = setup.config.distillation.teacher
    if kind in ("last", "next"):
        return last_exit if kind == "last" else next_exit
    if kind == "ema":
        assert average is not None, "the configuration was checked for ema_decay"
        return NetworkTeacher(average.network, autocast(setup.config.train.precision, setup.device))
    return setup.model_teacher(network.num_classes)
