"""Networks without numbers: what they have in common with real ones, and what they take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from adaptive import create_model
from adaptive.networks.create import outline_model
from adaptive.networks.fake_copy import cheap_to_run, is_outline, outline


@pytest.mark.parametrize("name", ["test_vit", pytest.param("efficientvim_m1", marks=pytest.mark.full)])
def test_an_outline_is_the_network_without_numbers(name: str) -> None:
    real, found = create_model(name, 7, 3, input_size=64), outline_model(name, 7, 3, input_size=64)
    assert is_outline(found)
    assert found.costs() == real.costs()
    assert (found.exit_names, found.layer_ids, found.untrained) == (real.exit_names, real.layer_ids, real.untrained)
    for (key, tensor), (other, wanted) in zip(found.state_dict().items(), real.state_dict().items(), strict=True):
        assert (key, tensor.shape, tensor.stride(), tensor.dtype) == (
            other,
            wanted.shape,
            wanted.stride(),
            wanted.dtype,
        )


def test_an_outline_of_double_precision_keeps_its_integers() -> None:
    found = outline(torch.nn.BatchNorm2d(3), torch.float64)
    assert {t.dtype for t in found.state_dict().values()} == {torch.float64, torch.int64}
    assert is_outline(found)


def test_small_networks_are_rather_run() -> None:
    assert cheap_to_run(torch.nn.Linear(1000, 1000), 64)
    assert not cheap_to_run(torch.nn.Linear(1000, 1000), 800)
    assert not cheap_to_run(torch.nn.Linear(6000, 6000), 16)  # its copy in double precision would take 288 MB
    assert not cheap_to_run(outline(torch.nn.Linear(10, 10)), 64)


BUILD = """
import sys, torch, adaptive.networks.create
def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
before = peak()
network = adaptive.networks.create.create_model("vit_large_patch16_224")
weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
print((peak() - before) / weights)
"""


@pytest.mark.full  # a network of 1.2 GB
def test_the_start_of_a_large_network_takes_little_more_memory_than_its_weights() -> None:
    said = subprocess.run([sys.executable, "-c", BUILD], check=True, capture_output=True, text=True).stdout
    assert float(said) <= 1.6
