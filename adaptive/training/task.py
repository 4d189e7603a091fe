"""The training task: a batch in, one loss and what to report out, so that the loop never hears of exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from adaptive.data.images.transforms import Mixer
from adaptive.metrics import ExitMeter
from adaptive.tracking.record_keys import exit_records
from adaptive.training.engine.group import all_reduce
from adaptive.training.losses.distillation import Teacher
from adaptive.training.losses.exit_weights import StepWeights
from adaptive.training.losses.gradient_surgery import GradientSurgery
from adaptive.training.losses.objective import ExitObjective


class ClassificationTask:
    """Binds network, mixing, teacher and objective: turns a micro batch into one loss, and counts what is reported.

    With ``surgery`` the loss is a stand-in whose backward pass brings the changed gradients.
    """

    def __init__(
        self,
        forward: Callable[[Tensor], list[Tensor]],
        objective: ExitObjective,
        teacher: Teacher | None,
        mixer: Mixer,
        meter: ExitMeter,
        seed: int,
        weights: StepWeights,
        surgery: GradientSurgery | None = None,
    ):
        self.forward = forward
        self.objective = objective
        self.teacher = teacher
        self.mixer = mixer
        self.meter = meter
        self.seed = seed
        self.weights = weights
        self.surgery = surgery
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=meter.sums.device)

    def loss(self, images: Tensor, labels: Tensor, key: Sequence[int]) -> Tensor:
        """Return the scalar to minimise of images (N, 3, H, W) and labels (N,).

        ``key`` is (step, rank, micro batch): all randomness of the forward pass (mixing, dropout, stochastic depth) is
        a function of the seed and the key, so a resumed run draws what the undisturbed one drew.
        """
        seeds = [self.seed, *key]
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        images, targets = self.mixer(images, labels, seeds)
        logits = self.forward(images)
        teacher = self.teacher(images, logits) if self.teacher is not None else None
        step, _, micro = key
        weights = self.weights(step)
        losses = self.objective(logits, targets, teacher, weights)
        self.meter.add(logits, targets, losses.cross_entropy, losses.divergence)
        self.loss_sum += losses.total.detach() * len(images)
        if self.surgery is None:
            return losses.total
        counting = [loss if weight else None for loss, weight in zip(losses.weighted, weights, strict=True)]
        return self.surgery(counting, step, micro)

    def report(self) -> dict[str, float]:
        """Return what was counted since the last reset as record keys, summed over ranks (collective).

        ``train/loss`` is the objective that is minimised, weighted and distilled; ``train/exit_i/loss`` are the exits'
        cross entropies, and ``train/cross_entropy`` is their plain sum, as ``val/loss`` is in validation.
        """
        values = self.meter.reduce(all_reduce)
        samples = values.pop("samples")[0]
        loss = all_reduce(self.loss_sum.clone()).item() / max(samples, 1)
        return {"train/loss": loss, "train/cross_entropy": sum(values["loss"])} | exit_records(values, "train")

    def reset(self) -> None:
        """Start counting again."""
        self.meter.reset()
        self.loss_sum.zero_()
