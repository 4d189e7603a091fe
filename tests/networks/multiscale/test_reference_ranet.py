"""RANet against numbers measured on its authors' code: shapes, exits, costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.networks.reference import build_ranet, configurations

entries = pytest.mark.parametrize("entry", configurations("ranet.json"))
SIZES = {"ImageNet": 224}


def shapes(*modules: nn.Module) -> list[list[int]]:
    return [list(p.shape) for module in modules for p in module.parameters()]


@entries
def test_reference_parameters(entry: dict[str, Any]) -> None:
    network = build_ranet(entry)
    assert len(network.exits) == entry["num_exits"]
    assert sum(p.numel() for p in network.parameters()) == entry["params_total"]
    assert shapes(network.blocks[0].stem) == entry["param_shapes_first"]
    flows: list[list[list[list[int]]]] = []
    for block in network.blocks:
        if block.new_flow or not flows:
            flows.append([])
        flows[-1] += [shapes(dense) for dense in block.dense]
    assert flows == entry["param_shapes_flows"]
    assert [0, *map(len, flows)] == entry["nBlocks_per_scale"]
    assert [shapes(exit_) for exit_ in network.exits] == entry["param_shapes_classifier"]


@entries
def test_reference_costs(entry: dict[str, Any]) -> None:
    network = build_ranet(entry)
    costs = network.costs(SIZES.get(entry["config"].get("data", "cifar10"), 32))
    assert [c.macs for c in costs] == entry["FlopCounterMode_MACs_cumulative_incl_previous_classifiers"]
    assert costs[-1].parameters == entry["official_params_per_exit"][-1]
    assert [c.parameters for c in network.costs(lazy=True)] == [c.parameters for c in costs]


@entries
def test_reference_shapes_of_the_state(entry: dict[str, Any]) -> None:
    """Every block hands on as many tensors as the next one was built to read."""
    network = build_ranet(entry).eval()
    state = network.start(torch.zeros(1, 3, 64, 64))
    with torch.no_grad():
        for i in range(len(network.blocks)):
            state = network.run_block(i, state)
            assert len(state) == len(network.batch_dims[i])
    assert len(state) == 1
