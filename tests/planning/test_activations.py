"""Traced bytes against counts by hand, for networks small enough to count."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adaptive.planning.activations import Activations, LiveBytes, Trace, fake_copy, trace_activations
from adaptive.training.phases import plan_phase
from tests.training.engines import chain_config, chain_network


def kept(network: nn.Module, *shape: int) -> int:
    """Bytes alive after the forward pass, the output's own included."""
    mode = FakeTensorMode()
    fake = fake_copy(network, mode)
    with mode, LiveBytes() as counter:
        counter.ignore(*fake.parameters(), *fake.buffers())
        images = torch.empty(*shape)
        before = counter.live
        output = fake(images)
        assert isinstance(output, Tensor)
        return counter.live - before


def test_two_linear_layers_by_hand() -> None:
    # ReLU keeps its result, 8 x 16, not what it was given; the output is 8 x 4.
    two = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    assert kept(two, 8, 32) == 4 * (8 * 16 + 8 * 4)
    inplace = nn.Sequential(nn.Linear(32, 16), nn.ReLU(inplace=True), nn.Linear(16, 4))
    assert kept(inplace, 8, 32) == 4 * (8 * 16 + 8 * 4)
    # SiLU keeps what it was given, and its result is the output.
    assert kept(nn.Sequential(nn.Linear(32, 16), nn.SiLU()), 8, 32) == 4 * 2 * (8 * 16)


def test_a_convolution_with_batchnorm_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5))
    maps = 4 * 2 * 5 * 6 * 6
    # The convolution's output (BatchNorm's backward needs it), BatchNorm's output, and its mean and 1 / deviation.
    assert kept(network, 2, 3, 6, 6) == 2 * maps + 2 * 4 * 5


def test_nothing_is_computed_or_changed() -> None:
    network = chain_network(True)
    before = {name: p.clone() for name, p in network.named_parameters()}
    state = torch.get_rng_state()
    tree = chain_config({})
    trace_activations(tree, plan_phase(tree, tree.resolved_phases()[0], 3), network, 4)
    assert all(torch.equal(before[name], p) for name, p in network.named_parameters())
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_step_ends_with_the_gradients_alone() -> None:
    network, tree = chain_network(True), chain_config({})
    found = trace_activations(tree, plan_phase(tree, tree.resolved_phases()[0], 3), network, 4)
    parameters = 4 * sum(p.numel() for p in network.parameters())
    assert found.small.gradients[-1] == found.large.gradients[-1] == parameters
    assert found.small.live[-1] < found.small.kept / 10


def test_batches_between_and_beyond_the_traced_ones() -> None:
    network, tree = chain_network(True), chain_config({})
    plan = plan_phase(tree, tree.resolved_phases()[0], 3)
    few, many = (trace_activations(tree, plan, network, batch) for batch in (2, 12))
    assert few.kept(12) == pytest.approx(many.kept(12), rel=1e-3)
    assert few.evaluation(12) == pytest.approx(many.evaluation(12), rel=1e-3)
    assert few.moments(12)[0].max() == pytest.approx(many.moments(12)[0].max(), rel=1e-3)


@pytest.mark.parametrize("train", [{"checkpointing": True}, {"precision": "bf16"}, {"channels_last": True}])
def test_options_are_honoured(train: dict) -> None:
    network = chain_network(True)
    traced = (
        trace_activations(tree, plan_phase(tree, tree.resolved_phases()[0], 3), network, 8)
        for tree in (chain_config({}), chain_config(train))
    )
    plain, other = (found.kept(16) - found.kept(8) for found in traced)
    if train.get("channels_last"):
        assert other == pytest.approx(plain, rel=0.1)
    else:
        assert other < 0.8 * plain


def test_moments_that_a_later_one_exceeds_are_left_out() -> None:
    live, gradients = np.array([5.0, 9.0, 4.0, 7.0, 1.0]), np.array([0.0, 0.0, 1.0, 2.0, 3.0])
    trace = Trace(4, 9, live, gradients, 3)
    double = Trace(8, 18, 2 * live, gradients, 6)
    found, complete = Activations(trace, double).moments(4)
    assert (found.tolist(), complete.tolist()) == ([9.0, 7.0, 1.0], [0.0, 2.0, 3.0])
    assert Activations(trace, double).kept(12) == 27
