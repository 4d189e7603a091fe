"""Metrics of every exit: loss, top-1, top-5 and agreement with the last exit, as exact sums over all samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.errors import DataError

# Rows of the sums, in order; every one is a sum over samples.
ROWS = ("samples", "loss", "top1", "top5", "divergence", "agreement")


class ExitMeter:
    """Sums over samples of each exit's loss, top-1 and top-5 hits, KL to the teacher, agreement with the last exit."""

    def __init__(self, exits: int, device: torch.device | str):
        self.exits = exits
        self.sums = torch.zeros(len(ROWS), exits, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        cross_entropy: Tensor | None = None,
        divergence: Tensor | None = None,
    ) -> None:
        """Add a batch: k logits (N, C), labels (N,) or soft labels (N, C); label -1 marks padding, not counted.

        ``cross_entropy`` and ``divergence`` are per-exit batch means where the caller has them already.
        """
        hard = labels if labels.ndim == 1 else labels.argmax(dim=-1)
        real = hard >= 0
        count = real.sum().double()
        outputs = torch.stack([z.detach().float() for z in logits])  # (k, N, C)
        top5 = outputs.topk(min(5, outputs.shape[-1]), dim=-1).indices
        # The order of logits that are not numbers means nothing: no answer, so no hit.
        answered = outputs.isfinite().all(dim=-1, keepdim=True)
        hits = (top5 == hard.view(1, -1, 1)) & real.view(1, -1, 1) & answered
        agree = (top5[..., 0] == top5[-1, :, 0]) & real & answered[..., 0] & answered[-1, :, 0]
        if cross_entropy is None:
            losses = torch.stack([F.cross_entropy(z, hard, ignore_index=-1, reduction="sum") for z in outputs])
        else:
            losses = cross_entropy * count
        taught = torch.zeros_like(losses) if divergence is None else divergence * count
        rows = [count.expand(self.exits), losses, hits[..., 0].sum(1), hits.any(-1).sum(1), taught, agree.sum(1)]
        self.sums += torch.stack([row.double() for row in rows])

    def reset(self) -> None:
        """Start again from zero."""
        self.sums.zero_()

    def reduce(self, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, list[float]]:
        """Sum over ranks and return per exit: samples, loss, top1 and top5 and agreement in percent, divergence."""
        sums = all_reduce(self.sums.clone()).cpu()
        samples = sums[0]
        scale = {"top1": 100.0, "top5": 100.0, "agreement": 100.0}
        values = {"samples": samples.tolist()}
        for row, name in enumerate(ROWS[1:], start=1):
            values[name] = (sums[row] / samples.clamp(min=1) * scale.get(name, 1.0)).tolist()
        return values


class LabelledBatch(Protocol):
    """Images with their labels, as the evaluation's stream hands them out."""

    @property
    def images(self) -> Tensor:
        """Images (N, 3, H, W)."""

    @property
    def labels(self) -> Tensor:
        """Labels (N,), -1 for padding."""


@dataclass(frozen=True)
class Measurement:
    """Per exit, first exit first: cross entropy, top-1 and top-5 and agreement with the last exit in percent."""

    samples: int
    loss: list[float]
    top1: list[float]
    top5: list[float]
    agreement: list[float]


@torch.no_grad()  # not inference_mode: ZeRO 3 gathers parameters in here that training uses again
def measure_exits(
    forward: Callable[[Tensor], list[Tensor]],
    batches: Iterable[LabelledBatch],
    exits: int,
    device: torch.device,
    expected: int,
    all_reduce: Callable[[Tensor], Tensor] = lambda values: values,
) -> Measurement:
    """Run every exit over the batches of this rank and sum over ranks.

    Bad images that the batches' stream left out (its ``left_out``) are not expected.

    Raises:
        DataError: the number of images counted differs from ``expected``, or more were bad than may be.
    """
    meter = ExitMeter(exits, device)
    for batch in batches:
        meter.add(forward(batch.images.to(device, non_blocking=True)), batch.labels.to(device, non_blocking=True))
    found = _summary(meter, all_reduce)
    left_out = getattr(batches, "left_out", None)
    if left_out is not None:
        bad = round(all_reduce(torch.tensor([float(sum(left_out.values()))], device=device)).item())
        if bad > (limit := batches.bad.limit):  # type: ignore[attr-defined]
            raise DataError(f"evaluation met {bad} bad images over all ranks, data.max_bad = {limit} allows no more")
        expected -= bad
    if found.samples != expected:
        raise DataError(f"evaluation counted {found.samples} images, but the split holds {expected}")
    return found


def measure_outputs(logits: Tensor, labels: Tensor, batch: int = 1024) -> Measurement:
    """Measure stored outputs: logits (k, N, C) and labels (N,)."""
    meter = ExitMeter(len(logits), logits.device)
    for start in range(0, len(labels), batch):
        meter.add(list(logits[:, start : start + batch]), labels[start : start + batch])
    return _summary(meter, lambda sums: sums)


def _summary(meter: ExitMeter, all_reduce: Callable[[Tensor], Tensor]) -> Measurement:
    values = meter.reduce(all_reduce)
    samples = round(values["samples"][0])
    return Measurement(samples, values["loss"], values["top1"], values["top5"], values["agreement"])
