"""The loss over all exits: cross entropy and one-for-all distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.errors import ConfigError
from adaptive.training.losses.distillation import distillation_divergence


@dataclass(frozen=True)
class ExitLosses:
    """One loss to minimise and what it is made of.

    ``total`` is a scalar with gradient: the sum of ``weighted``, which holds every exit's share, with gradient too.
    ``cross_entropy`` and ``divergence`` hold one detached value per exit, averaged over the batch (the divergence is
    T^2 * KL from the teacher, 0 where nothing is taught).
    """

    total: Tensor
    weighted: list[Tensor]
    cross_entropy: Tensor
    divergence: Tensor


class ExitObjective:
    """Weighted sum over exits of (1 - gamma) * CE + gamma * T^2 * KL; the last exit learns from labels alone.

    With the last exit as teacher this is the one-for-all distillation of arXiv 1908.06294, section 3.3. With an
    external teacher (``teach_last``) the last exit is taught too, for it is then a student like the others. A teacher
    may also be a list with logits for every exit.
    """

    def __init__(
        self,
        exits: int,
        weights: Sequence[float] | None = None,
        gamma: float = 0.0,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        teach_last: bool = False,
    ):
        if weights is not None and len(weights) != exits:
            raise ConfigError(f"exit weights {list(weights)} have {len(weights)} values for {exits} exits")
        self.weights = [1.0] * exits if weights is None else [float(w) for w in weights]
        self.gamma = gamma
        self.temperature = temperature
        self.reduction = reduction
        self.taught = exits if teach_last else exits - 1

    def __call__(
        self,
        logits: Sequence[Tensor],
        targets: Tensor,
        teacher: Tensor | Sequence[Tensor | None] | None = None,
        weights: Sequence[float] | None = None,
    ) -> ExitLosses:
        """Compute the loss of k logits (N, C) against class indices (N,) or soft labels (N, C).

        Args:
            logits: of every exit.
            targets: labels.
            teacher: the teacher's logits (N, C), or one such tensor per exit (None: that exit learns from labels
                alone), or None where nothing is distilled.
            weights: this step's weight of every exit, instead of the usual ones.
        """
        weights = self.weights if weights is None else weights
        teachers = [teacher] * len(logits) if teacher is None or isinstance(teacher, Tensor) else teacher
        total = _at_least_single(logits[0].new_zeros(()))
        weighted, entropies, divergences = [], [], []
        for i, (exit_logits, guide) in enumerate(zip(logits, teachers, strict=True)):
            z = _at_least_single(exit_logits)
            entropy = F.cross_entropy(z, targets)
            divergence = torch.zeros_like(entropy)
            loss = entropy
            if guide is not None and self.gamma > 0 and i < self.taught:
                divergence = distillation_divergence(z, _at_least_single(guide), self.temperature, self.reduction)
                loss = (1 - self.gamma) * entropy + self.gamma * divergence
            weighted.append(weights[i] * loss)
            total = total + weighted[-1]
            entropies.append(entropy.detach())
            divergences.append(divergence.detach())
        return ExitLosses(total, weighted, torch.stack(entropies), torch.stack(divergences))


def _at_least_single(values: Tensor) -> Tensor:
    """Losses are computed in fp32 where logits come in less, and in double precision where they come in that."""
    return values if values.dtype == torch.float64 else values.float()
