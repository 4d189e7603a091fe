"""Gradient Equilibrium on a chain against the ratios measured on the authors' rescaling."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from adaptive.networks.equilibrium import fork
from tests.networks.reference import FOLDER

FILE = FOLDER / "equilibrium_telescoping.json"


@pytest.mark.skipif(not FILE.is_file(), reason=f"no {FILE}: set ADAPTIVE_REFERENCE")
def test_reference_ratios_on_a_chain() -> None:
    chain = json.loads(FILE.read_text())["chain"]
    k = chain["k"]
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(k)).double()
    exits = nn.ModuleList(nn.Linear(5, 3) for _ in range(k)).double()
    images, labels = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    gradients = {}
    for equilibrium in (False, True):
        blocks.zero_grad()
        exits.zero_grad()
        feature, loss = images, torch.zeros((), dtype=torch.float64)
        for i in range(k):
            feature = tap = blocks[i](feature)
            if equilibrium and i < k - 1:
                tap, feature = fork(feature, k - i)
            loss = loss + nn.functional.cross_entropy(exits[i](tap), labels)
        loss.backward()
        gradients[equilibrium] = [block[0].weight.grad.clone() for block in blocks]
        gradients[equilibrium, "exits"] = [e.weight.grad.clone() for e in exits]
    for plain, equalised, ratio in zip(gradients[False], gradients[True], chain["ratio_ge_over_plain"], strict=True):
        torch.testing.assert_close(equalised, plain * ratio, rtol=1e-12, atol=1e-15)
    for plain, equalised in zip(gradients[False, "exits"], gradients[True, "exits"], strict=True):
        torch.testing.assert_close(equalised, plain, rtol=0, atol=1e-15)
