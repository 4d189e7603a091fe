"""Seeding of the global generators that timm and torchvision draw from, whoever makes the draws."""

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


@contextmanager
def preserved() -> Iterator[None]:
    """Give random, numpy and torch's CPU generator back afterwards as they were.

    Without workers they are the training process's own generators, which must not notice.
    """
    # Exchanging numpy's bit generator is ten times faster than copying its state there and back.
    states = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        mtrand.set_bit_generator(states[1])
        torch.set_rng_state(states[2])


def seed(purpose: int, *entropy: int) -> None:
    """Seed random, numpy and torch's CPU generator from numbers >= 0; inside `preserved`."""
    sequence = np.random.SeedSequence(entropy, spawn_key=(purpose,))
    words = sequence.generate_state(2)
    random.seed(int(words[0]))
    mtrand.set_bit_generator(np.random.PCG64(sequence))
    # Not torch.manual_seed, which would reseed the GPU's generator (dropout) as well.
    torch.default_generator.manual_seed(int(words[1]))


@contextmanager
def seeded(purpose: int, *entropy: int) -> Iterator[None]:
    """Seed as `seed` does, and give the generators back afterwards as they were."""
    with preserved():
        seed(purpose, *entropy)
        yield
