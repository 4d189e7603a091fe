"""Stochastic exits: each step leaves early exits out of the loss at random, as dropout does with units.

The draw is a function of seed and step alone: every rank and micro batch of a step leaves out the same exits, so the
global step is well defined, and a resumed run draws what the undisturbed one drew.
"""

from __future__ import annotations

import numpy as np

# Spawn key: keeps these draws apart from the other uses of the seed, whose entropy looks alike.
EXIT_DROP = 11


def drop_factors(exits: int, probability: float, seed: int, step: int) -> list[float]:
    """Return what every exit's loss is multiplied by in a step: 0 where it is left out, else 1 / (1 - probability).

    The expectation is 1 for every exit. The last exit is never left out and has 1.
    """
    generator = np.random.default_rng(np.random.SeedSequence([seed, step], spawn_key=(EXIT_DROP,)))
    kept = generator.random(exits - 1) >= probability
    return [float(k) / (1 - probability) for k in kept] + [1.0]
