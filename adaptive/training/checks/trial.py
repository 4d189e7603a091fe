"""A forward and a backward pass of every phase without arithmetic: does it run, and what does it teach?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

from adaptive.config.sections import Config
from adaptive.errors import ConfigError
from adaptive.networks.fake_copy import fake_copy
from adaptive.networks.network import AdaptiveNetwork
from adaptive.training.batch import ENOUGH, BatchSizes, most_ranks, next_micro_batch, ranks_in_words
from adaptive.training.phases import PhasePlan, prepare_phase, set_modes

# What torch's batch_norm says of a channel with a single value, in training.
TOO_FEW_VALUES = "Expected more than 1 value per channel"


def check_phases_learn(
    config: Config, batch: BatchSizes, network: AdaptiveNetwork, plans: Sequence[PhasePlan]
) -> list[str]:
    """Refuse a micro batch of 1 that BatchNorm cannot take, and losses from which nothing would learn (ConfigError).

    One image for each of several ranks is too few for any BatchNorm: fewer ranks train the same, with statistics of
    more. Where train.micro_batch asks for one at a time, torch decides whether it can be normalised. Where nothing can
    be wrong, nothing is tried. Returns notes on exits that learn without a loss of their own.
    """
    notes = []
    shared = config.model.sync_batchnorm and batch.world > 1  # its statistics are those of all ranks' images
    for number, plan in enumerate(plans):
        if batch.micro_batch > 1 and all(plan.exit_weights):
            continue
        images = ENOUGH if shared else batch.micro_batch
        alone = batch.share == 1 and batch.world > 1 and not shared
        tried = _forward(network, plan, images, alone, _too_few(config, batch, plan))
        if tried is not None and not all(plan.exit_weights):
            notes += _check_reach(config, number, plan, *tried)
    return notes


def _forward(
    network: AdaptiveNetwork, plan: PhasePlan, images: int, alone: bool, too_few: str
) -> tuple[AdaptiveNetwork, list[Tensor]] | None:
    """Run a phase's network in its modes on fake images.

    Returns it with the logits of its exits; None where its operations depend on values, which fake tensors lack.
    ``alone`` lets no BatchNorm take its statistics from this batch.
    """
    mode = FakeTensorMode()
    fake: AdaptiveNetwork = fake_copy(network, mode)
    prepare_phase(fake, plan)
    set_modes(fake, plan)
    if alone and any(isinstance(part, _BatchNorm) and part.training for part in fake.modules()):
        raise ConfigError(too_few)
    with torch.random.fork_rng(devices=[]), mode:
        size = fake.input_size
        try:
            return fake, fake(torch.empty(images, fake.channels, size, size))
        except ValueError as error:
            if TOO_FEW_VALUES not in str(error):
                raise
            raise ConfigError(too_few) from None
        except RuntimeError:
            return None


def _too_few(config: Config, batch: BatchSizes, plan: PhasePlan) -> str:
    key, remedy = f"train.micro_batch = {batch.limit}", ""
    if batch.share == 1:
        key = f"train.global_batch = {batch.global_batch} on {batch.world} rank(s) is a micro batch of 1"
        if fewer := most_ranks(config, batch.world):
            remedy += f" ({ranks_in_words(fewer)} at most)"
        remedy += f", train.global_batch={ENOUGH * batch.world}"
    elif batch.limit == 1:
        remedy = f", for example train.micro_batch={next_micro_batch(config, batch)}"
    else:
        key += f": the {batch.share} images of a rank divide into micro batches of 1 alone"
        remedy = f", for example train.micro_batch={next_micro_batch(config, batch)}"
    synchronised = ", or model.sync_batchnorm=true" if batch.world > 1 else ""
    return (
        f"{key}: BatchNorm has a single image to take its statistics from in phase {plan.name!r} of training; use 2 "
        f"images or more per rank and forward pass{remedy}{synchronised}"
    )


def _check_reach(
    config: Config, number: int, plan: PhasePlan, fake: AdaptiveNetwork, logits: list[Tensor]
) -> list[str]:
    """Refuse losses that reach no learning parameter; note exits that learn, but get no gradient."""
    own = bool(config.phases) and config.phases[number].exit_weights is not None
    key = f"phases.{number}.exit_weights" if own else "train.exit_weights"
    counting = [z.sum() for z, weight in zip(logits, plan.exit_weights, strict=True) if weight and z.requires_grad]
    learning = [p for p in fake.parameters() if p.requires_grad]
    reached: set[int] = set()
    if counting and learning:
        gradients = torch.autograd.grad(torch.stack(counting).sum(), learning, allow_unused=True)
        reached = {id(p) for p, gradient in zip(learning, gradients, strict=True) if gradient is not None}
    if not reached:
        raise ConfigError(
            f"{key} = {plan.exit_weights}: these losses reach nothing that learns in phase {plan.name!r} "
            f"(learn: {plan.learn}); give a weight above 0 to an exit that learns"
        )
    idle = [i for i, part in enumerate(fake.exits, start=1) if _idle(part, reached)]
    if not idle:
        return []
    named = ", ".join(map(str, idle))
    return [
        f"{key} = {plan.exit_weights}: exit(s) {named} learn nothing in phase {plan.name!r}, though they are not frozen"
    ]


def _idle(part: nn.Module, reached: set[int]) -> bool:
    learning = [p for p in part.parameters() if p.requires_grad]
    return bool(learning) and not any(id(p) in reached for p in learning)
