"""What learns in a phase, what stays frozen and in eval mode, and which losses and techniques act."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adaptive.config import Config, PhaseConfig
from adaptive.errors import ConfigError
from adaptive.networks.network import AdaptiveNetwork, Equilibrium


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


def plan_phase(config: Config, phase: PhaseConfig, exits: int) -> PhasePlan:
    """Fill in what a phase leaves open (raises ConfigError for links that the network lacks).

    A phase that learns the backbone alone trains the plain network: its last exit's loss, without GE and links,
    unless the phase says otherwise.
    """
    alone = phase.learn == "backbone"
    model = config.model
    scope: Equilibrium = "crossing" if model.equilibrium is True else model.equilibrium
    equilibrium: Equilibrium = False if alone else scope
    if phase.equilibrium is not None:
        equilibrium = (scope or "crossing") if phase.equilibrium else False
    collaboration = model.collaboration and not alone
    if phase.collaboration is not None:
        collaboration = phase.collaboration
    if collaboration and not model.collaboration:
        raise ConfigError(f"phase {phase.name!r} asks for collaboration, but model.collaboration is false")
    weights = phase.exit_weights
    if weights is None:
        weights = [0.0] * (exits - 1) + [1.0] if alone else config.train.exit_weights or [1.0] * exits
    if len(weights) != exits:
        raise ConfigError(f"exit_weights = {weights} has {len(weights)} values for {exits} exits")
    return PhasePlan(
        name=phase.name,
        epochs=phase.epochs,
        learn=phase.learn,
        lr=phase.lr or config.optimizer.lr,
        equilibrium=equilibrium,
        collaboration=collaboration,
        gamma=config.distillation.gamma if phase.distillation else 0.0,
        exit_weights=list(weights),
    )


def frozen_parts(network: AdaptiveNetwork, plan: PhasePlan) -> list[nn.Module]:
    """Return the modules that do not learn in this phase."""
    links = [link for link in (getattr(e, "link", None) for e in network.exits) if link is not None]
    parts: list[nn.Module] = [] if plan.collaboration else list(links)
    if plan.learn == "backbone":
        parts += [*list(network.exits)[:-1], *links]
    elif plan.learn in ("exits", "early_exits"):
        parts += list(network.blocks)
        if plan.learn == "early_exits":
            parts.append(network.exits[-1])
    return parts


def prepare_phase(network: AdaptiveNetwork, plan: PhasePlan) -> None:
    """Switch techniques on or off and freeze what does not learn; call before the optimizer is built."""
    network.equilibrium = plan.equilibrium
    network.collaboration = plan.collaboration
    network.requires_grad_(True)
    for part in frozen_parts(network, plan):
        part.requires_grad_(False)


def set_modes(network: AdaptiveNetwork, plan: PhasePlan) -> None:
    """Put what learns into training mode and what is frozen into eval mode (its BatchNorm statistics stay put)."""
    network.train()
    for part in frozen_parts(network, plan):
        part.eval()
