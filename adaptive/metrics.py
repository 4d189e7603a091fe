"""Sums per exit, kept on the device and counted, never averaged batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

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
        hits = (top5 == hard.view(1, -1, 1)) & real.view(1, -1, 1)
        agree = (top5[..., 0] == top5[-1, :, 0]) & real
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


def exit_records(values: dict[str, list[float]], prefix: str) -> dict[str, float]:
    """Spell reduced values as record keys: ``train/exit_1/top1`` and so on; ``<prefix>/loss`` sums the exits."""
    records = {f"{prefix}/loss": sum(values["loss"])}
    for name in ROWS[1:]:
        for i, value in enumerate(values[name], start=1):
            records[f"{prefix}/exit_{i}/{name}"] = value
    return records
