"""How much every exit's loss counts: fixed weights, a warm-up of the last exit alone, exits left out at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adaptive.config.sections import EXIT_WEIGHTS
from adaptive.errors import ConfigError


def resolve_exit_weights(weights: Sequence[float] | str | None, exits: int) -> list[float]:
    """Return one weight per exit for a list of them, one of ``EXIT_WEIGHTS``, or None (equal).

    ``linear_up`` is i / k and ``linear_down`` (k - i + 1) / k for exit i of k, both scaled so that their mean is 1 and
    the sum of the losses keeps its size.

    Raises:
        ConfigError: another name, or another number of weights than exits.
    """
    if weights is None or weights == "equal":
        return [1.0] * exits
    if weights == "linear_up":
        return [2 * i / (exits + 1) for i in range(1, exits + 1)]
    if weights == "linear_down":
        return [2 * i / (exits + 1) for i in range(exits, 0, -1)]
    if isinstance(weights, str):
        raise ConfigError(f"exit_weights = {weights!r} is no weighting; use {', '.join(EXIT_WEIGHTS)}, or a list")
    if len(weights) != exits:
        raise ConfigError(f"exit_weights = {list(weights)} has {len(weights)} values for {exits} exits")
    return [float(weight) for weight in weights]


@dataclass(frozen=True)
class StepWeights:
    """The weight of every exit's loss as a function of the step, so that a resumed run weighs as the undisturbed one.

    Attributes:
        weights: the usual weights, first exit first.
        last_only_until: steps (counted over the whole run) before this one train the last exit alone.
        drop: probability that an early exit is left out of a step.
        seed: seed of those draws.
    """

    weights: tuple[float, ...]
    last_only_until: int = 0
    drop: float = 0.0
    seed: int = 0

    def __call__(self, step: int) -> list[float]:
        """Return the weights of a step, the same on all ranks and in all its micro batches."""
        weights = list(self.weights)
        if step < self.last_only_until:
            return [0.0] * (len(weights) - 1) + weights[-1:]
        if self.drop:
            factors = drop_factors(len(weights), self.drop, self.seed, step)
            return [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        return weights


# Spawn key: keeps these draws apart from the other uses of the seed, whose entropy looks alike.
EXIT_DROP = 11


def drop_factors(exits: int, probability: float, seed: int, step: int) -> list[float]:
    """Return what every exit's loss is multiplied by in a step: 0 where it is left out, else 1 / (1 - probability).

    The expectation is 1 for every exit. The last exit is never left out and has 1.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, step], spawn_key=(EXIT_DROP,)))
    kept = generator.random(exits - 1) >= probability
    return [float(k) / (1 - probability) for k in kept] + [1.0]
