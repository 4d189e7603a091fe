"""Every exit over a whole dataset split, each image counted exactly once over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from adaptive.errors import DataError
from adaptive.metrics import ExitMeter


class LabelledBatch(Protocol):
    """Images (N, 3, H, W) and labels (N,), -1 marking padding."""

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
    channels_last: bool = False,
) -> Measurement:
    """Run every exit over the batches of this rank and sum over ranks.

    Bad images that the batches' stream left out (its ``left_out``) are not expected.

    Raises:
        DataError: the number of images counted differs from ``expected``, or more were bad than may be.
    """
    meter = ExitMeter(exits, device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for batch in batches:
        images = batch.images.to(device, non_blocking=True, memory_format=layout)
        meter.add(forward(images), batch.labels.to(device, non_blocking=True))
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
