"""Learned gates: a small network per early exit that scores how little an image would gain from going on.

In the line of EENet (Ilhan et al., WACV 2024, arXiv 2301.07099) and JEI-DNN (Regol et al., ICLR 2024,
arXiv 2310.09163): the gates of all exits are trained together, for the accuracy of the whole policy at a mean cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptive.inference.policy import FEATURES, Gate, features, remember

UNITS = 16
STEPS = 250
_LEARNING_RATE = 0.02
_MULTIPLIER_RATE = 0.05
_PENALTY = 5.0
_IMAGES = 10_000  # more teach a network of this size nothing


def fit_gates(
    probabilities: Tensor | Sequence[Tensor],
    labels: Tensor,
    costs: Sequence[float],
    budget: float,
    seed: int = 0,
    images: Tensor | None = None,
) -> list[Gate]:
    """Train the gates of all early exits for the least expected error at a mean cost.

    With the gate's answer g_i an image leaves at exit i with probability P_i = g_i prod_{j<i} (1 - g_j). Minimised is
    the mean of sum_i P_i [exit i is wrong], under the constraint that the mean of sum_i P_i cost_i is the budget, by
    Adam on an augmented Lagrangian, full batch, float32. Of more than 10,000 images a sample is taken.

    Args:
        probabilities: k x (N, C) of held-out images.
        labels: (N,).
        costs: of one image up to each exit, strictly rising.
        budget: mean cost of an image, in the unit of ``costs``.
        seed: of the first weights and the sample; torch's own generator stays as it is.
        images: numbers of those to learn from; by default all.

    Returns:
        k - 1 gates, first exit first; the normalisation of their inputs is part of their weights.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(probabilities) == 1:
        return []
    images = torch.arange(len(labels)) if images is None else images
    if len(images) > _IMAGES:
        images = images[torch.randperm(len(images), generator=generator)[:_IMAGES]]
    probabilities, labels = torch.stack([values[images] for values in probabilities]), labels[images]
    inputs = gate_inputs(probabilities)
    mean, spread = inputs.mean(dim=1, keepdim=True), inputs.std(dim=1, keepdim=True, correction=0)
    scale = torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), torch.zeros_like(spread))
    wrong = (probabilities.argmax(dim=-1) != labels).float()
    weight, bias, out, out_bias = _train(
        (inputs - mean) * scale, wrong, _relative(costs), _share(costs, budget), generator
    )
    folded = weight * scale
    shift = bias - (folded * mean).sum(dim=-1)
    parts = zip(folded.tolist(), shift.tolist(), out.tolist(), out_bias.tolist(), strict=True)
    return [Gate(weight=w, bias=b, out=o, out_bias=c) for w, b, o, c in parts]


def gate_inputs(probabilities: Tensor) -> Tensor:
    """Return what the gates read, (k - 1, N, 6), from probabilities (k, N, C)."""
    memory, found = None, []
    for i, values in enumerate(probabilities[:-1]):
        confidences, answers = values.max(dim=-1)
        memory = remember(memory, answers, confidences)
        found.append(features(i, values, memory))
    return torch.stack(found).float()


def _relative(costs: Sequence[float]) -> Tensor:
    """Costs with 0 for the first exit and 1 for the last."""
    values = torch.tensor(costs, dtype=torch.float64)
    return ((values - values[0]) / (values[-1] - values[0])).float()


def _share(costs: Sequence[float], budget: float) -> float:
    return (budget - costs[0]) / (costs[-1] - costs[0])


def _train(
    inputs: Tensor, wrong: Tensor, costs: Tensor, budget: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight (k-1, H, 6), bias (k-1, H), out (k-1, H), out_bias (k-1,)."""
    early = len(inputs)
    weight = (torch.randn(early, UNITS, len(FEATURES), generator=generator) / len(FEATURES) ** 0.5).requires_grad_()
    bias = torch.zeros(early, UNITS, requires_grad=True)
    out = (torch.randn(early, UNITS, generator=generator) / UNITS**0.5).requires_grad_()
    out_bias = torch.zeros(early, requires_grad=True)
    parameters = [weight, bias, out, out_bias]
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    multiplier = 0.0
    for _ in range(STEPS):
        hidden = torch.baddbmm(bias.unsqueeze(1), inputs, weight.transpose(1, 2)).relu()
        logits = (hidden @ out.unsqueeze(2)).squeeze(2) + out_bias.unsqueeze(1)
        leaving = exit_distribution(logits.sigmoid())
        error = (leaving * wrong).sum(dim=0).mean()
        excess = (leaving * costs.unsqueeze(1)).sum(dim=0).mean() - budget
        optimizer.zero_grad()
        (error + multiplier * excess + _PENALTY / 2 * excess**2).backward()
        optimizer.step()
        schedule.step()
        multiplier += _MULTIPLIER_RATE * float(excess.detach())
    return weight.detach(), bias.detach(), out.detach(), out_bias.detach()


def exit_distribution(gates: Tensor) -> Tensor:
    """Return P_i = g_i prod_{j<i} (1 - g_j), (k, N), from the gates' answers (k - 1, N); the last takes the rest."""
    stays = (1 - gates).cumprod(dim=0)
    arrives = torch.cat([torch.ones_like(gates[:1]), stays])
    return torch.cat([gates * arrives[:-1], arrives[-1:]])
