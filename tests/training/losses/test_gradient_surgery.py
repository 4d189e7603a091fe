"""PCGrad against a straightforward one written here, alone and through the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive.training.losses.gradient_surgery import GradientSurgery, lay_out, project_conflicts, projection_orders
from tests.helpers.ranks import run_ranks
from tests.training.engines import SmallRun, chain_config, chain_network, distance, global_batch

Named = dict[str, Tensor]


def plain_pcgrad(gradients: list[Named], orders: list[list[int]]) -> tuple[Named, int]:
    """Algorithm 1 of arXiv 2001.06782, tensor by tensor; returns the sum over exits and how often it projected."""
    total: Named = {}
    conflicts = 0
    for i, order in enumerate(orders):
        mine = {name: g.double().clone() for name, g in gradients[i].items()}
        for j in order:
            common = [name for name in mine if name in gradients[j]]
            product = sum((mine[n] * gradients[j][n].double()).sum() for n in common)
            if common and product < 0:
                conflicts += 1
                square = sum((gradients[j][n].double() ** 2).sum() for n in common)
                for n in common:
                    mine[n] -= product / square * gradients[j][n].double()
        for name, g in mine.items():
            total[name] = total.get(name, 0) + g
    return {name: g.float() for name, g in total.items()}, conflicts


def random_gradients(touches: list[list[int]], seed: int = 0) -> list[list[Tensor | None]]:
    """Gradients of exits for parameters of several shapes; ``touches[i]`` are the parameters that exit i reaches."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (7,), (2, 2, 2), (5,), (1,)]
    return [
        [torch.randn(shape, generator=generator) if n in own else None for n, shape in enumerate(shapes)]
        for own in touches
    ]


@pytest.mark.parametrize(
    "touches", [[[0, 1], [0, 1]], [[0, 3], [0, 1, 4], [0, 1, 2]], [[0], [1], [2]], [[0, 1, 2], [], [0, 4]]]
)
@pytest.mark.parametrize("seed", range(5))
def test_surgery_equals_the_plain_algorithm(touches: list[list[int]], seed: int) -> None:
    gradients = random_gradients(touches, seed)
    parameters = [torch.nn.Parameter(torch.zeros(s)) for s in [(4, 3), (7,), (2, 2, 2), (5,), (1,)]]
    orders = projection_orders(len(touches), seed, 3)
    named = [{str(n): g for n, g in enumerate(own) if g is not None} for own in gradients]
    expected, _ = plain_pcgrad(named, orders)

    handed: list[Tensor] = []

    def surrogate(_: Any, changed: Any) -> Tensor:
        handed.extend(changed)
        return torch.zeros(())

    surgery = GradientSurgery(parameters, surrogate, lambda t: t, lambda: 1.0, accumulation=1, world=1, seed=seed)
    losses = [
        sum(((p * g).sum() for p, g in zip(parameters, own, strict=True) if g is not None), torch.zeros(()))
        for own in gradients
    ]
    surgery(losses, step=3, micro=0)
    for n, parameter in enumerate(parameters):
        wanted = expected.get(str(n), torch.zeros_like(parameter))
        torch.testing.assert_close(handed[n], wanted, rtol=1e-5, atol=1e-6)


def test_what_one_exit_alone_touches_stays_as_it_is() -> None:
    gradients = random_gradients([[0, 1], [0, 2]])
    gradients[1][0] = -gradients[0][0]  # a conflict, for sure
    regions = lay_out(gradients)
    project_conflicts(regions.flat, [[1], [0]])
    assert torch.equal(regions.flat[0][0,], gradients[0][1].flatten())
    assert torch.equal(regions.flat[1][1,], gradients[1][2].flatten())
    assert regions.flat[0][0, 1].abs().max() < 1e-6  # opposite gradients annihilate each other


def test_gradients_of_zero_and_gradients_that_are_not_finite() -> None:
    silent = {(0, 1): torch.zeros(3)}
    loud = {(0, 1): torch.ones(3)}
    project_conflicts([silent, loud], [[1], [0]])
    assert torch.equal(loud[0, 1], torch.ones(3))
    assert torch.equal(silent[0, 1], torch.zeros(3))
    broken = {(0, 1): torch.tensor([1.0, torch.nan, 1.0])}
    project_conflicts([broken, loud], [[1], [0]])
    assert not torch.isfinite(loud[0, 1] + broken[0, 1]).all()  # the engine will skip the step


def test_order_of_projection_is_a_function_of_seed_and_step() -> None:
    assert projection_orders(5, 1, 2) == projection_orders(5, 1, 2)
    orders = {str(projection_orders(4, seed, step)) for seed in range(3) for step in range(10)}
    assert len(orders) > 20
    for i, order in enumerate(projection_orders(4, 0, 0)):
        assert sorted([*order, i]) == [0, 1, 2, 3]


def expected_step(equilibrium: bool, weights: list[float]) -> tuple[Named, Named, int]:
    """PCGrad's and the plain sum's gradient of the global batch of step 0, by autograd in one process."""
    network = chain_network(equilibrium).train()
    images, labels = global_batch(0)
    losses = [w * F.cross_entropy(z, labels) for w, z in zip(weights, network(images), strict=True)]
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        gradients.append({n: g for n, g in zip(names, found, strict=True) if g is not None})
    counting = [g if w else {} for g, w in zip(gradients, weights, strict=True)]
    changed, conflicts = plain_pcgrad(counting, projection_orders(3, 0, 0))
    complete = {n: changed.get(n, torch.zeros_like(p)) for n, p in zip(names, parameters, strict=True)}
    plain = {n: sum(g.get(n, torch.zeros_like(p)) for g in gradients) for n, p in zip(names, parameters, strict=True)}
    return complete, plain, conflicts


# Name: training options, equilibrium, tolerance (relative distance of the worst tensor). fp32 differs by the order of
# sums alone; bf16 and fp16 by the 8 and 11 bits of their products.
CASES: dict[str, tuple[dict[str, Any], bool, float]] = {
    "stage 0": ({"zero_stage": 0}, False, 2e-5),
    "stage 1": ({"zero_stage": 1}, False, 2e-5),
    "stage 2": ({"zero_stage": 2}, False, 2e-5),
    "accumulated": ({"zero_stage": 0, "micro_batch": 2}, False, 2e-5),
    "accumulated, stage 1": ({"zero_stage": 1, "micro_batch": 4}, False, 2e-5),
    "accumulated, stage 2": ({"zero_stage": 2, "micro_batch": 4}, False, 2e-5),
    "equilibrium": ({"zero_stage": 2}, True, 2e-5),
    "weights": ({"zero_stage": 1, "exit_weights": [0.5, 0.0, 2.0]}, False, 2e-5),
    "fp16, stage 0": ({"zero_stage": 0, "precision": "fp16"}, False, 0.02),
    "fp16, stage 2": ({"zero_stage": 2, "precision": "fp16"}, False, 0.02),
    "bf16": ({"zero_stage": 2, "precision": "bf16"}, False, 0.05),
}


def _surgery_steps() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, (train, equilibrium, _) in CASES.items():
        tree = chain_config({"gradient_surgery": "pcgrad", **train}, model={"equilibrium": equilibrium})
        running = SmallRun(tree)
        expected, plain, conflicts = expected_step(equilibrium, tree.train.exit_weights or [1.0] * 3)
        measured = running.gradients_applied()
        found[name] = {
            "distance": distance(measured, expected),
            "from plain": distance(measured, plain)[0],
            "conflicts": conflicts,
        }
        assert not running.step(1, spoiled_rank=running.world - 1), f"{name}: a step with NaN was applied"
        running.engine.destroy()
    return found


@pytest.mark.full  # the algorithm alone is tested above
@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2])
def test_the_engine_applies_what_the_plain_algorithm_gives(world: int) -> None:
    for found in run_ranks(_surgery_steps, world):
        for name, (_, _, tolerance) in CASES.items():
            far, tensor = found[name]["distance"]
            assert far < tolerance, (name, tensor, far)
            if name != "weights":
                assert found[name]["conflicts"] > 0, name
                assert found[name]["from plain"] > max(0.1, 3 * far), name
