"""Trains a small network of four exits on a few noisy digits and stores its logits of all the others, twice noised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from adaptive import create_model

TRAINED, EPOCHS, BATCH, NOISE = 300, 24, 50, 0.8


def main() -> None:
    """Write population.npz: logits (4, N, 10) float16, labels (N,) uint8, costs (4,) in multiply-adds."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    torch.manual_seed(0)
    order = torch.randperm(len(digits.target))
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 8 - 1
    images = F.interpolate(pixels, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target)[order]
    network = create_model("resnet10t", 10, 4, False, False, input_size=32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(TRAINED).split(BATCH):
            noisy = images[chosen] + NOISE * torch.randn_like(images[chosen])
            loss = sum(F.cross_entropy(logits, labels[chosen]) for logits in network(noisy))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    tested = images[TRAINED:].repeat(2, 1, 1, 1)
    tested = tested + NOISE * torch.randn_like(tested)
    with torch.inference_mode():
        parts = [torch.stack(network(part)) for part in tested.split(250)]
    logits = torch.cat(parts, dim=1).half()
    truth = labels[TRAINED:].repeat(2)
    print("top-1:", (logits.argmax(-1) == truth).double().mean(1).tolist())
    np.savez_compressed(
        Path(__file__).with_name("population.npz"),
        logits=logits.numpy(),
        labels=truth.numpy().astype(np.uint8),
        costs=np.array([cost.macs for cost in network.costs()], dtype=np.float64),
    )


if __name__ == "__main__":
    main()
