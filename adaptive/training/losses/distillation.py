"""Distillation between exits (one-for-all, OFA) and from other networks: the divergence, and the teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptive.networks.network import AdaptiveNetwork

# (images, logits of every exit) -> the logits to learn from: one tensor (N, C) for all exits, or one per exit.
Teacher = Callable[[Tensor, Sequence[Tensor]], Tensor | Sequence[Tensor | None]]


def distillation_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """Return T^2 * KL(softmax(teacher / T) || softmax(student / T)), without gradient into the teacher.

    Logits are (N, C). ``batchmean`` sums over classes and averages over the batch; ``mean`` divides by C as well, as
    the released code of arXiv 1908.06294 does.
    """
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher.detach() / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    if reduction == "mean":  # torch is about to change what its own "mean" means here
        divergence = divergence / student.shape[-1]
    return divergence * temperature**2


def last_exit(images: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """Let the last exit teach, without gradient."""
    return logits[-1].detach()


def next_exit(images: Tensor, logits: Sequence[Tensor]) -> list[Tensor | None]:
    """Let every exit be taught by its successor, without gradient; the last one has none."""
    return [*(successor.detach() for successor in logits[1:]), None]


class NetworkTeacher:
    """A network in eval mode that teaches with its (last) logits."""

    def __init__(self, network: nn.Module, autocast: torch.autocast):
        self.network = network.eval().requires_grad_(False)
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self, images: Tensor, logits: Sequence[Tensor]) -> Tensor:
        """Return the teacher's logits (N, C) for images (N, 3, H, W)."""
        with self.autocast:
            outputs = self.network(images)
        return outputs if isinstance(outputs, Tensor) else outputs[-1]


def frozen_teacher(network: AdaptiveNetwork, collaboration: bool, autocast: torch.autocast) -> NetworkTeacher:
    """Teach with the last exit of a copy of the network as it is now.

    Args:
        network: as it was trained so far.
        collaboration: whether it was trained with its links; untrained ones would change what its last exit says.
        autocast: context of the copy's forward pass.
    """
    teacher = copy.deepcopy(network)
    teacher.collaboration = collaboration
    return NetworkTeacher(teacher, autocast)
