"""Logits of every exit for every image of a split, kept for calibration and reports; policies simulated on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from adaptive.errors import DataError
from adaptive.inference.policy import Decision, Policy
from adaptive.metrics import LabelledBatch


class IdentifiedBatch(LabelledBatch, Protocol):
    """A labelled batch that also says which samples it holds."""

    @property
    def ids(self) -> Tensor:
        """Numbers of the samples in their split, -1 for padding."""


@dataclass(frozen=True)
class Outputs:
    """Logits of k exits for N images, on the CPU, in the order of the split.

    Attributes:
        logits: (k, N, C) float32.
        labels: (N,) int64.
        ids: (N,) int64, numbers of the images in their split.
        left_out: bad images that are not among them, by kind.
    """

    logits: Tensor
    labels: Tensor
    ids: Tensor
    left_out: Mapping[str, int] = field(default_factory=dict)

    def subset(self, images: Tensor) -> Outputs:
        """The same for some images, given by their places (n,)."""
        return Outputs(self.logits[:, images], self.labels[images], self.ids[images])

    def probabilities(self, policy: Policy) -> ExitProbabilities:
        """Softmax at the policy's temperatures, one exit after another."""
        return ExitProbabilities(self.logits, policy)


class ExitProbabilities(Sequence[Tensor]):
    """Probabilities (N, C) of k exits, each made when it is asked for: all at once take as much memory as the logits.

    Args:
        logits: (k, N, C).
        policy: its temperatures count.
    """

    def __init__(self, logits: Tensor, policy: Policy) -> None:
        self._logits, self._policy = logits, policy

    def __len__(self) -> int:
        return len(self._logits)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(f"exit {i} of {len(self)}, from 0")
        return self._policy.probabilities(i, self._logits[i])


class Predictions(NamedTuple):
    """Answers to N images, each of which left at the exit that a policy chose.

    Attributes:
        labels: (N,) int64.
        confidences: (N,) probability of the label, at the exit's temperature.
        exits: (N,) int64, where the image left, from 1 to k.
    """

    labels: Tensor
    confidences: Tensor
    exits: Tensor

    def counts(self, exits: int) -> list[int]:
        """How many leave at each of k exits."""
        return torch.bincount(self.exits - 1, minlength=exits).tolist()

    def top1(self, labels: Tensor) -> float:
        """Accuracy in percent."""
        return 100 * (self.labels == labels).double().mean().item()


@torch.inference_mode()
def collect(
    forward: Callable[[Tensor], list[Tensor]],
    batches: Iterable[IdentifiedBatch],
    device: torch.device,
    expected: int,
) -> Outputs:
    """Run every exit over a split, on one rank.

    Args:
        forward: images (N, 3, H, W) -> k logits (N, C).
        batches: the split, each image once.
        device: where to run.
        expected: number of images in the split; bad ones that the batches' stream left out are not among the outputs.

    Raises:
        DataError: the number of images differs from ``expected``.
    """
    kept, labels, ids = torch.empty(0), [], []
    count = 0
    for batch in batches:
        real = batch.labels >= 0
        images = batch.images.to(device, non_blocking=True)
        logits = torch.stack([z.float() for z in forward(images)]).cpu()[:, real]
        if not len(kept):  # one block of memory, filled piece by piece: pieces to be joined would take twice as much
            kept = torch.empty(len(logits), expected, logits.shape[2])
        if count + logits.shape[1] <= expected:
            kept[:, count : count + logits.shape[1]] = logits
        count += logits.shape[1]
        labels.append(batch.labels[real])
        ids.append(batch.ids[real])
    left_out: Mapping[str, int] = getattr(batches, "left_out", {})
    if count + sum(left_out.values()) != expected:
        raise DataError(f"evaluation counted {count} images, but the split holds {expected}")
    found, order = torch.cat(labels), torch.cat(ids).argsort()
    if not torch.equal(order, torch.arange(count)):
        for values in kept:
            values[:count] = values[order]
    return Outputs(kept[:, :count], found[order], torch.cat(ids)[order], left_out)


def scores(policy: Policy, probabilities: Tensor | Sequence[Tensor]) -> Tensor:
    """Return every exit's score for every image, (k, N), from probabilities k x (N, C), as if nobody had left."""
    return torch.stack([decision.scores for decision in decisions(policy, probabilities)])


def simulate(policy: Policy, probabilities: Tensor | Sequence[Tensor]) -> Predictions:
    """Let a policy decide over stored probabilities, k x (N, C), as the runner does while it computes them.

    The predictions are on the device of the probabilities.
    """
    made = decisions(policy, probabilities)
    found = torch.stack([decision.scores for decision in made])
    reached = found >= torch.tensor(policy.thresholds, dtype=found.dtype, device=found.device).unsqueeze(1)
    reached[-1] = True
    leaves = reached.to(torch.uint8).argmax(dim=0)
    images = torch.arange(len(leaves), device=leaves.device)
    labels = torch.stack([decision.labels for decision in made])[leaves, images]
    confidences = torch.stack([decision.confidences for decision in made])[leaves, images]
    return Predictions(labels, confidences, leaves + 1)


def decisions(policy: Policy, probabilities: Tensor | Sequence[Tensor]) -> list[Decision]:
    """Return a policy's decisions on all N images at every exit, from probabilities k x (N, C)."""
    memory, found = None, []
    for i, values in enumerate(probabilities):
        found.append(policy.decide(i, values, memory))
        memory = found[-1].memory
    return found
