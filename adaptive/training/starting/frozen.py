"""Refuses phases in which a part that was never loaded or learned stays frozen: it would teach, and end at, chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn

from adaptive.config.sections import Config
from adaptive.errors import ConfigError
from adaptive.networks.collaboration import CollaborationLink
from adaptive.networks.exits import Exit
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.phases import PhasePlan, classifiers, frozen_parts

LOADING = "model.pretrained=true, model.weights=FILE or model.from_run=RUN"


def check_frozen(config: Config, network: AdaptiveNetwork, plans: Sequence[PhasePlan]) -> None:
    """Follow through the phases what is still random, and refuse it where it is frozen and used (raises ConfigError).

    A part is used where its exit's loss counts, where it feeds such an exit, and where it teaches.

    Args:
        config: of the run.
        network: as it begins.
        plans: its phases.
    """
    fresh = _random(network)
    learned: set[nn.Parameter] = set()
    for i, plan in enumerate(plans):
        key = f"phases.{i}.learn = {plan.learn!r}" if config.phases else f"phase {plan.name!r}"
        teacher = config.distillation.teacher if plan.gamma else None
        if teacher == "frozen" and (part := _first(network, fresh & _path(network, [len(network.exits) - 1]))):
            where = f" in phase {plan.name!r}" if config.phases else ""
            raise ConfigError(
                f"distillation.teacher = 'frozen'{where}: {part} is still random as the phase begins, and would teach "
                f"noise; give it weights ({LOADING}), or let a phase with distillation: false learn before"
            )
        if plan.reset:
            fresh |= _reset(network)
        learning, counted = _learning(network, plan), _counted(plan)
        taught = range(len(network.exits)) if teacher == "next" else [len(network.exits) - 1]
        used = _path(network, [*counted, *(taught if teacher in ("last", "next", "ema") else ())], plan.collaboration)
        if part := _first(network, (fresh & used) - learning):
            raise ConfigError(f"{key}: {part} {_why(plan)}; {_remedy(network, part, i)}")
        fresh = _after(network, plan, fresh)
        learned |= learning
    for number, exit_ in enumerate(_exits(network)):
        if (fresh & _end(exit_)) - learned:
            raise ConfigError(
                f"phases: {_exit_name(network, number)} is random and never learns; add a phase with learn: "
                "early_exits, or leave the exits out with model.exits=1"
            )


def still_random(network: AdaptiveNetwork, plans: Sequence[PhasePlan]) -> set[str]:
    """Return the names of the parameters that are random after these phases, of those that were before."""
    fresh = {p for name, p in network.named_parameters() if name in network.untrained}
    for plan in plans:
        fresh = _after(network, plan, fresh)
    return {name for name, p in network.named_parameters() if p in fresh}


def _after(network: AdaptiveNetwork, plan: PhasePlan, fresh: set[nn.Parameter]) -> set[nn.Parameter]:
    """Return what is still random after a phase."""
    fresh = fresh | _reset(network) if plan.reset else fresh
    return fresh - (_learning(network, plan) & _path(network, _counted(plan), plan.collaboration))


def _counted(plan: PhasePlan) -> list[int]:
    """Return the numbers of the exits whose loss counts."""
    return [number for number, weight in enumerate(plan.exit_weights) if weight > 0]


def _random(network: AdaptiveNetwork) -> set[nn.Parameter]:
    """Return the parameters that hold random values; norms and biases begin with a constant that does no harm."""
    ends = {p for exit_ in _exits(network) for p in _end(exit_)}
    silent = {p for link in _links(network) for p in link.parameters() if _adds_nothing(link)}
    found = {p for name, p in network.named_parameters() if name in network.untrained}
    return {p for p in found - silent if p in ends or _varies(p)}


def _varies(parameter: nn.Parameter) -> bool:
    """Whether not all of a parameter is one constant; of an outline's, which has no numbers, whether it is a matrix."""
    return parameter.ndim > 1 if parameter.is_meta else bool((parameter != parameter.flatten()[0]).any())


def _adds_nothing(link: CollaborationLink) -> bool:
    weight = link.projection.weight
    return link.projection.start_at_zero if weight.is_meta else not weight.any()


def _reset(network: AdaptiveNetwork) -> set[nn.Parameter]:
    """Return the parameters that are random after `reset_classifiers`; a link that starts at zero adds nothing."""
    ends = {p for exit_ in _exits(network) for p in _end(exit_)}
    return ends | {p for link in _links(network) for p in link.parameters() if not link.projection.start_at_zero}


def _learning(network: AdaptiveNetwork, plan: PhasePlan) -> set[nn.Parameter]:
    frozen = {p for part in frozen_parts(network, plan) for p in part.parameters()}
    return (set(network.parameters()) - frozen) | {p for m in classifiers(network, plan) for p in m.parameters()}


def _path(network: AdaptiveNetwork, exits: Sequence[int], links: bool = False) -> set[nn.Parameter]:
    """Return the parameters that these exits' logits depend on."""
    if not exits:
        return set()
    found = {p for block in list(network.blocks)[: max(exits) + 1] for p in block.parameters()}
    everything = range(max(exits) + 1) if links else exits
    found |= {p for number in everything for p in network.exits[number].parameters()}
    return found if links else found - {p for link in _links(network) for p in link.parameters()}


def _exits(network: AdaptiveNetwork) -> list[Exit]:
    return [cast(Exit, exit_) for exit_ in network.exits]


def _end(exit_: Exit) -> set[nn.Parameter]:
    """Return the parameters of the layers that give an exit's logits."""
    return {p for module in exit_.own_classifiers() for p in module.parameters()}


def _links(network: AdaptiveNetwork) -> list[CollaborationLink]:
    return [exit_.link for exit_ in _exits(network) if exit_.link is not None]


def _first(network: AdaptiveNetwork, parameters: set[nn.Parameter]) -> str:
    """Return the name of the first part that one of the parameters belongs to; empty without any."""
    for block in network.blocks:
        if parameters & set(block.parameters()):
            return "the backbone"
    for number, exit_ in enumerate(network.exits):
        if parameters & set(exit_.parameters()):
            return _exit_name(network, number)
    return ""


def _exit_name(network: AdaptiveNetwork, number: int) -> str:
    return "the last exit" if number == len(network.exits) - 1 else f"exit {number + 1}"


def _why(plan: PhasePlan) -> str:
    reset = " or after reset_classifiers" if plan.reset else ""
    return (
        f"is frozen there with random values, which nothing loaded has replaced and no phase has learned before{reset}"
    )


def _remedy(network: AdaptiveNetwork, part: str, phase: int) -> str:
    if part == "the backbone":
        return f"give it weights ({LOADING}), or learn it in an earlier phase (learn: backbone)"
    if part == "the last exit":
        others = f"give weights of these {network.num_classes} classes, or learn it in an earlier phase"
        return f"use phases.{phase}.learn=exits, in which it learns; or {others}"
    return f"use phases.{phase}.learn=exits or all, in which it learns, or leave its loss out"
