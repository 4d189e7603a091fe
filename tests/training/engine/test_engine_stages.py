"""At every ZeRO stage, on two ranks: which gradient the optimizer sees, what a NaN does, and what can be read whole."""

from __future__ import annotations

import hashlib
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.device import DeviceRank
from tests.helpers.ranks import run_ranks
from tests.training.engines import SmallRun, chain_config, chain_network, distance, global_batch, multi_scale_network

# Training options and tolerance: the relative distance (2-norm) of the worst tensor. In fp32 only the order of sums
# differs; bf16 keeps 8 bits of every product.
VARIANTS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 1e-5),
    "accumulated": ({"micro_batch": 4}, 1e-5),
    "checkpointing": ({"checkpointing": True}, 1e-5),
    "bf16": ({"precision": "bf16"}, 0.05),
}
PRECISIONS = ("fp32", "bf16", "fp16")
# What is trained at the others equals a plain loop: test_parity.py.
STAGES = [0, *(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2, 3))]


@cache
def closed_form(device: torch.device) -> dict[str, Tensor]:
    """Gradient Equilibrium without any: the summed loss's gradient, block j's divided by k - j + 1."""
    network = chain_network(equilibrium=False).to(device).train()
    images, labels = (t.to(device) for t in global_batch(0))
    sum(F.cross_entropy(z, labels) for z in network(images)).backward()
    for behind, block in enumerate(reversed(network.blocks), start=1):
        for parameter in block.parameters():
            parameter.grad /= behind
    return {name: p.grad for name, p in network.named_parameters()}


def _equilibrium(stage: int, train: dict[str, Any]) -> dict[str, Any]:
    running = SmallRun(chain_config({"zero_stage": stage, **train}))
    device = running.engine.device
    expected = closed_form(device)
    start = {n: p.detach().to(device) for n, p in chain_network(True).named_parameters()}
    before = running.weights()
    for micro, loss in enumerate(running.losses(0), start=1):
        running.engine.backward(loss)
        if micro == running.batch.accumulation:
            seen = {n: running.engine.full_gradient(p) for n, p in running.network.named_parameters()}
        assert running.engine.step() == (micro == running.batch.accumulation)
    after = running.weights()
    moved = {name: (before[name] - after[name]) / 1024.0 for name in before}
    found = {
        "start": all(torch.equal(before[name], start[name]) for name in start),
        "moved": distance(moved, expected),
        "seen": distance({n: g for n, g in seen.items() if g is not None}, expected),
    }
    running.engine.destroy()
    return found


def _multi_scale(stage: int) -> tuple[float, str]:
    """Distance of MSDNet's gradient with Gradient Equilibrium from the closed form, both as the optimizer sees them.

    Each rank's BatchNorm sees its own images, in both steps the same ones.
    """
    found = {}
    for scope in (False, "crossing"):
        model = {"backbone": "msdnet", "exits": 3, "equilibrium": scope}
        running = SmallRun(chain_config({"zero_stage": stage}, model=model), multi_scale_network())
        for loss in running.losses(0):
            running.engine.backward(loss)
        gradients = {n: running.engine.full_gradient(p) for n, p in running.network.named_parameters()}
        found[scope] = {n: torch.zeros(1) if g is None else g for n, g in gradients.items()}
        running.engine.step()
        running.engine.destroy()
    blocks = len(running.network.blocks)
    closed = {n: g / (blocks - int(n.split(".")[1])) if n.startswith("blocks.") else g for n, g in found[False].items()}
    return distance(found["crossing"], closed)


def _spoiled(stage: int, precision: str) -> dict[str, Any]:
    """A step to which the last rank brings a NaN, between two ordinary ones."""
    running = SmallRun(chain_config({"zero_stage": stage, "precision": precision, "clip_norm": 1e-5}))
    weights = [running.weights()]
    running.applied_step(1)
    weights.append(running.weights())
    skipped = not running.step(2, spoiled_rank=running.world - 1)
    weights.append(running.weights())
    running.applied_step(3)
    weights.append(running.weights())
    running.engine.destroy()
    flat = torch.cat([w.flatten() for w in weights[-1].values()])
    return {
        "skipped": skipped,
        "moved": [any(not torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(weights)],
        "finite": bool(torch.isfinite(flat).all()),
        "digest": hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest(),
    }


def _all_cases(stage: int) -> dict[str, Any]:
    """Everything of one stage in one start of the ranks."""
    return {
        "equilibrium": {name: _equilibrium(stage, train) for name, (train, _) in VARIANTS.items()},
        "multi scale": _multi_scale(stage),
        "spoiled": {precision: _spoiled(stage, precision) for precision in PRECISIONS},
    }


@pytest.fixture(scope="module", params=STAGES)
def cases(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(_all_cases, 2, request.param)


@pytest.mark.ranks
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_optimizer_sees_the_closed_form_of_equilibrium(cases, variant: str) -> None:
    """Blocks get the mean over the exits behind them, exits their full gradient, whatever the stage."""
    for rank in cases:
        far, tensor = rank["equilibrium"][variant]["moved"]
        assert far < VARIANTS[variant][1], (tensor, far)


@pytest.mark.ranks
def test_the_optimizer_sees_the_closed_form_on_a_multi_scale_network(cases) -> None:
    for rank in cases:
        far, tensor = rank["multi scale"]
        assert far < 1e-5, (tensor, far)


@pytest.mark.ranks
def test_weights_and_gradients_are_read_whole(cases) -> None:
    for rank in cases:
        assert rank["equilibrium"]["plain"]["start"], "gathered weights are not those the network began with"
        for variant in ("plain", "accumulated", "checkpointing"):
            far, tensor = rank["equilibrium"][variant]["seen"]
            assert far < VARIANTS[variant][1], (variant, tensor, far)


@pytest.mark.ranks
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_nan_on_one_rank_skips_the_step_on_both(cases, precision: str) -> None:
    both = [rank["spoiled"][precision] for rank in cases]
    for found in both:
        assert found["skipped"]
        assert found["moved"] == [True, False, True]
        assert found["finite"]
    assert both[0]["digest"] == both[1]["digest"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One rank alone at every stage on a GPU; on the CPU, where two ranks say more, at one of them."""
    if "cases_of_one_rank" in metafunc.fixturenames:
        stages = range(4) if metafunc.config.getoption("--device") == "cuda" else [2]
        chosen = [pytest.param(stage, marks=pytest.mark.full) for stage in stages]
        metafunc.parametrize("cases_of_one_rank", chosen, indirect=True, scope="module")


@pytest.fixture(scope="module")
def cases_of_one_rank(request: pytest.FixtureRequest, device_rank: DeviceRank) -> dict[str, Any]:
    return device_rank(_all_cases, request.param)


@pytest.mark.device
@pytest.mark.ranks
def test_one_rank_on_the_device_sees_the_closed_form(cases_of_one_rank, device: torch.device) -> None:
    """Whole, accumulated, checkpointed and in bf16; a multi-scale network too."""
    cases = cases_of_one_rank
    for variant, (_, tolerance) in VARIANTS.items():
        found = cases["equilibrium"][variant]
        assert found["start"]
        for seen in ("moved", "seen"):
            far, tensor = found[seen]
            # Micro batches of 4 and of 16 are other kernels on a GPU, and sums over thousands of terms lose a digit.
            assert far < (tolerance if device.type == "cpu" else max(tolerance, 1e-4)), (variant, seen, tensor, far)
    far, tensor = cases["multi scale"]
    assert far < (1e-5 if device.type == "cpu" else 1e-3), (tensor, far)


@pytest.mark.device
@pytest.mark.ranks
def test_one_rank_on_the_device_skips_a_step_that_is_not_finite(cases_of_one_rank) -> None:
    for precision, found in cases_of_one_rank["spoiled"].items():
        assert found["skipped"], precision
        assert found["moved"] == [True, False, True], precision
        assert found["finite"], precision
