"""Random numbers of augmentation and mixing: the global generators, seeded for each sample or batch by its position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import mtrand

# Spawn keys: they keep these draws apart from each other and from the sample order's, whose entropy looks alike.
AUGMENT = 1
MIX = 2
CROP = 3


@contextmanager
def preserved() -> Iterator[None]:
    """Restore the state of random, numpy and torch's CPU generator afterwards.

    Without workers they are the training process's own generators, whose draws must not depend on the data.
    """
    # Exchanging numpy's bit generator is ten times faster than copying its state there and back.
    states = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        mtrand.set_bit_generator(states[1])
        torch.set_rng_state(states[2])


class Seeds:
    """Seeds of random, numpy and torch's CPU generator, derived from numbers >= 0.

    Deriving them takes several times as long as using them: many are best derived in a row.
    """

    def __init__(self, purpose: int, *entropy: int) -> None:
        sequence = np.random.SeedSequence(entropy, spawn_key=(purpose,))
        self._python, self._torch = sequence.generate_state(2).tolist()
        self._numpy = np.random.PCG64(sequence)

    def use(self) -> None:
        """Seed the global generators; once, and inside `preserved`."""
        random.seed(self._python)
        mtrand.set_bit_generator(self._numpy)
        # Not torch.manual_seed, which would reseed the GPU's generator (dropout) as well.
        torch.default_generator.manual_seed(self._torch)


@contextmanager
def seeded(purpose: int, *entropy: int) -> Iterator[None]:
    """Seed the generators from numbers >= 0, and restore their states afterwards."""
    with preserved():
        Seeds(purpose, *entropy).use()
        yield
