"""Data-sheet figures of GPUs: the rates that a measured one is compared with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Peak rates of one GPU, as its maker states them for dense matrices.

    Attributes:
        name: part of what ``torch.cuda.get_device_name`` answers.
        tflops: by precision, in 10^12 operations/s; ``fp32`` without tensor cores, ``tf32`` with them.
        bandwidth: of its memory, in bytes/s.
    """

    name: str
    tflops: dict[str, float]
    bandwidth: float


# NVIDIA's data sheets (SXM versions; H100 also in its version for PCIe), without sparsity.
CARDS = (
    Card("H200", {"bf16": 989.0, "tf32": 494.5, "fp32": 67.0}, 4.8e12),
    Card("H100 80GB HBM3", {"bf16": 989.0, "tf32": 494.5, "fp32": 67.0}, 3.35e12),
    Card("H100 PCIe", {"bf16": 756.0, "tf32": 378.0, "fp32": 51.0}, 2.0e12),
    Card("A100", {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5}, 2.0e12),
)


def find_card(device_name: str) -> Card | None:
    """Return the card of a device's name, or None for one that is not in the list."""
    return next((card for card in CARDS if card.name in device_name), None)
