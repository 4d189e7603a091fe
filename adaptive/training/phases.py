"""What learns in a phase, what stays frozen and in eval mode, and which losses and techniques act."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from adaptive.config.sections import Config, PhaseConfig
from adaptive.errors import ConfigError
from adaptive.networks.collaboration import CollaborationLink
from adaptive.networks.equilibrium import Equilibrium, equilibrium_scope
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.losses.exit_weights import StepWeights, resolve_exit_weights


@dataclass(frozen=True)
class PhasePlan:
    """A phase with its defaults filled in."""

    name: str
    epochs: int
    learn: str
    lr: float
    equilibrium: Equilibrium
    collaboration: bool
    gamma: float
    exit_weights: list[float]
    last_only_epochs: float
    exit_drop: float
    surgery: bool
    reset: bool

    def weights_from(self, first_step: int, steps_per_epoch: int, seed: int) -> StepWeights:
        """Return the exits' weights by step, for a phase whose first step is the run's ``first_step``."""
        last_only = round(self.last_only_epochs * steps_per_epoch)
        return StepWeights(tuple(self.exit_weights), first_step + last_only, self.exit_drop, seed)


def plan_phase(config: Config, phase: PhaseConfig, exits: int) -> PhasePlan:
    """Fill in what a phase leaves open (raises ConfigError for links that the network lacks).

    A phase that learns the backbone alone trains the plain network: its last exit's loss, without GE and links,
    unless the phase says otherwise.
    """
    alone = phase.learn == "backbone"
    model = config.model
    equilibrium = False if alone else model.equilibrium
    if phase.equilibrium is not None:
        equilibrium = phase.equilibrium and (model.equilibrium or True)
    collaboration = model.collaboration and not alone
    if phase.collaboration is not None:
        collaboration = phase.collaboration
    if collaboration and not model.collaboration:
        raise ConfigError(f"phase {phase.name!r} asks for collaboration, but model.collaboration is false")
    weights = phase.exit_weights
    if weights is None:
        weights = [0.0] * (exits - 1) + [1.0] if alone else config.train.exit_weights
    train = config.train
    last_only = train.last_only_epochs if phase.last_only_epochs is None else phase.last_only_epochs
    return PhasePlan(
        name=phase.name,
        epochs=phase.epochs or config.train.epochs,
        learn=phase.learn,
        lr=phase.lr or config.optimizer.lr,
        equilibrium=equilibrium_scope(equilibrium),
        collaboration=collaboration,
        gamma=config.distillation.gamma if phase.distillation else 0.0,
        exit_weights=resolve_exit_weights(weights, exits),
        last_only_epochs=last_only,
        exit_drop=train.exit_drop,
        # Where only exits learn, no parameter belongs to two of them, and there is nothing to project.
        surgery=train.gradient_surgery == "pcgrad" and phase.learn in ("all", "backbone"),
        reset=phase.reset_classifiers,
    )


def frozen_parts(network: AdaptiveNetwork, plan: PhasePlan) -> list[nn.Module]:
    """Return the modules that do not learn in this phase, but for those inside of them that `classifiers` names."""
    links = [link for link in (getattr(e, "link", None) for e in network.exits) if link is not None]
    parts: list[nn.Module] = [] if plan.collaboration else list(links)
    if plan.learn == "backbone":
        parts += [*list(network.exits)[:-1], *links]
    elif plan.learn in ("exits", "early_exits", "classifiers"):
        parts += list(network.blocks)
        if plan.learn == "classifiers":
            parts += list(network.exits)
        if plan.learn == "early_exits":
            parts.append(network.exits[-1])
    return parts


def classifiers(network: AdaptiveNetwork, plan: PhasePlan) -> list[nn.Module]:
    """Return what learns of the exits where the phase learns classifiers alone: last linear layers, and links."""
    if plan.learn != "classifiers":
        return []
    return [m for m in network.classifiers() if plan.collaboration or not isinstance(m, CollaborationLink)]


def reset_classifiers(network: AdaptiveNetwork, seed: int) -> None:
    """Initialise last linear layers and links afresh, the same on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in network.classifiers():
            for part in module.modules():
                if callable(reset := getattr(part, "reset_parameters", None)):
                    reset()


def prepare_phase(network: AdaptiveNetwork, plan: PhasePlan) -> None:
    """Switch techniques on or off and freeze what does not learn; call before the optimizer is built."""
    network.equilibrium = plan.equilibrium
    network.collaboration = plan.collaboration
    network.requires_grad_(True)
    for part in frozen_parts(network, plan):
        part.requires_grad_(False)
    for part in classifiers(network, plan):
        part.requires_grad_(True)


def set_modes(network: AdaptiveNetwork, plan: PhasePlan) -> None:
    """Put what learns into training mode and what is frozen into eval mode (its BatchNorm statistics stay put)."""
    network.train()
    for part in frozen_parts(network, plan):
        part.eval()
    for part in classifiers(network, plan):
        part.train()
