"""Made-up networks: answers of exits that get better, sure of what they are right about."""

from __future__ import annotations

import torch

from adaptive.inference.calibration.thresholds import Scored


def made_up(exits: int, images: int, seed: int = 0) -> Scored:
    """Scores and correctness of exits that err on the same hard images, later ones more rarely."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.2 * torch.randn(exits, images, generator=generator).cumsum(0)
    ease = torch.randn(images, generator=generator) + torch.linspace(0.2, 1.2, exits).unsqueeze(1) + noise
    correct = torch.rand(exits, images, generator=generator) < (2 * ease).sigmoid()
    return Scored((1.3 * ease + 0.4 * torch.randn(exits, images, generator=generator)).sigmoid(), correct)


def made_up_logits(
    exits: int, images: int, classes: int = 5, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Logits (k, N, C), labels (N,) and costs (k,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (images,), generator=generator)
    signal = torch.nn.functional.one_hot(labels, classes) * (1.5 + torch.randn(images, 1, generator=generator))
    noise = torch.randn(exits, images, classes, generator=generator)
    strength = torch.linspace(0.6, 2.0, exits).view(-1, 1, 1)
    return signal * strength + noise, labels, [float(i + 1) for i in range(exits)]


def calibrated_logits(images: int = 3000, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of which the softmax is exactly the probability of the label that is drawn from it."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(images, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
