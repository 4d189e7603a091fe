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
def seeded(purpose: int, *entropy: int) -> Iterator[None]:
    """Seed random, numpy and torch's CPU generator from numbers >= 0, and give them back afterwards as they were.

    Without workers they are the training process's own generators, which must not notice.
    """
    sequence = np.random.SeedSequence(entropy, spawn_key=(purpose,))
    words = sequence.generate_state(2)
    # Exchanging numpy's bit generator is ten times faster than copying its state there and back.
    states = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
    random.seed(int(words[0]))
    mtrand.set_bit_generator(np.random.PCG64(sequence))
    # Not torch.manual_seed, which would reseed the GPU's generator (dropout) as well.
    torch.default_generator.manual_seed(int(words[1]))
    try:
        yield
    finally:
        random.setstate(states[0])
        mtrand.set_bit_generator(states[1])
        torch.set_rng_state(states[2])
