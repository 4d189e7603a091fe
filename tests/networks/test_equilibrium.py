from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from adaptive.networks.equilibrium import branch, fork
from adaptive.networks.precision import autocast
from tests.networks.conftest import build, images

# How far a gradient with Gradient Equilibrium may be from the closed form: distance (2-norm) of the worst tensor, as a
# share of its own size, or of a thousandth of the largest tensor's, for some are zero but for rounding. Both have the
# same forward pass; the forks' rounding differs, once per exit, and sums over batch and pixels cancel two to three
# digits: of 16 in fp64, of 7 in fp32. bf16 has 8 bits, so a rounding is up to 0.4 %. A wrong weight of a fork would be
# an error of a third or more.
TOLERANCES = {"fp64": 1e-12, "fp32": 1e-4, "bf16": 0.05}


@pytest.mark.device
@pytest.mark.parametrize("remaining", [2, 3, 7])
def test_backward_is_the_weighted_sum_of_finite_differences(remaining: int, device: torch.device) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64).to(device).requires_grad_()
    weights = torch.randn(2, 4, 3, dtype=torch.float64).to(device)

    def exit_loss(value: torch.Tensor) -> torch.Tensor:
        return (weights[0] * value.sin()).sum()

    def onward_loss(value: torch.Tensor) -> torch.Tensor:
        return (weights[1] * value.exp()).sum()

    tap, onward = fork(x, remaining)
    assert torch.equal(tap, x)
    assert torch.equal(onward, x)
    (exit_loss(tap) + onward_loss(onward)).backward()
    step = 1e-6
    for i in range(4):
        for j in range(3):
            up, down = x.detach().clone(), x.detach().clone()
            up[i, j] += step
            down[i, j] -= step
            slope_exit = (exit_loss(up) - exit_loss(down)) / (2 * step)
            slope_onward = (onward_loss(up) - onward_loss(down)) / (2 * step)
            expected = slope_exit / remaining + slope_onward * (remaining - 1) / remaining
            assert float(x.grad[i, j]) == pytest.approx(float(expected), abs=1e-8)


@pytest.mark.device
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_every_precision_has_the_closed_form(family: str, precision: str, device: torch.device) -> None:
    """Block j's gradient is the summed loss's divided by k - j + 1, an exit's is the summed loss's."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    gradients = {}
    for scope in (False, "crossing"):
        net = build(family).to(device, dtype).train()
        net.equilibrium = scope
        with autocast(precision, device) if precision == "bf16" else nullcontext():
            logits = net(images(net, 4).to(device, dtype))
        if precision == "bf16":
            assert logits[0].dtype == torch.bfloat16
        sum(z.to(dtype).square().mean() for z in logits).backward()
        gradients[scope] = {name: p.grad for name, p in net.named_parameters()}
    worst, floor = 0.0, 1e-3 * max(float(g.norm()) for g in gradients[False].values())
    for name, found in gradients["crossing"].items():
        kind, number = name.split(".")[:2]
        expected = gradients[False][name] / (len(net.blocks) - int(number) if kind == "blocks" else 1)
        assert found.device == expected.device == next(net.parameters()).device
        worst = max(worst, float((found - expected).norm() / expected.norm().clamp(min=floor)))
    assert worst < TOLERANCES[precision]


@pytest.mark.parametrize(("side", "share"), [(0, 1 / 4), (1, 3 / 4)])
def test_one_side_unused(side: int, share: float) -> None:
    x = torch.ones(3, requires_grad=True)
    fork(x, 4)[side].sum().backward()
    assert torch.equal(x.grad, torch.full((3,), share))


def test_tap_rescales_only_what_the_exit_reads() -> None:
    gradients = {}
    for scope in ("crossing", "tap"):
        state = tuple(torch.ones(2, requires_grad=True) for _ in range(2))
        tap, onward = branch(state, 4, scope)
        (tap.sum() + sum(t.sum() for t in onward)).backward()
        gradients[scope] = [float(t.grad[0]) for t in state]
    assert gradients == {"crossing": [1.0, 0.75], "tap": [1.0, 1.0]}


def test_integers_and_constants_pass() -> None:
    state = (torch.ones(2, requires_grad=True), torch.arange(2), torch.ones(2))
    _, onward = branch(state, 3, "crossing")
    assert onward[1] is state[1]
    assert onward[2] is state[2]


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_forward_does_not_change(family: str) -> None:
    net = build(family).train()
    outputs = []
    for equilibrium in (False, "crossing", "tap"):
        net.equilibrium = equilibrium
        outputs.append(net(images(net, 3)))
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_a_feature_that_is_changed_in_place_later_reaches_the_exit_unchanged() -> None:
    """VGG's ReLUs overwrite the convolution before them; naming that convolution needs a copy."""
    from adaptive import create_model

    arguments = {"input_size": 32, "mlp_ratio": 0.02}
    torch.manual_seed(0)
    net = create_model("vgg11", 4, ["features.3"], head_width=5, collaboration=False, **arguments).double()
    assert net.overwritten == [True]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    feature = net.run_block(0, net.start(x))[0]
    assert bool((feature < 0).any())
    expected = net.exits[0](feature)
    net.train()
    logits = net(x)
    assert torch.allclose(logits[0], expected)
    (logits[0].sum() + logits[1].sum()).backward()
    assert net.blocks[0].features.get_submodule("3").weight.grad is not None


def test_scopes_differ_where_several_tensors_cross() -> None:
    gradients = {}
    for scope in ("crossing", "tap"):
        net = build("crossvit").train()
        assert len(net.batch_dims[0]) == 2
        net.equilibrium = scope
        sum(z.square().mean() for z in net(images(net, 2))).backward()
        gradients[scope] = [next(block.parameters()).grad for block in net.blocks]
    assert not torch.allclose(gradients["crossing"][0], gradients["tap"][0])
    torch.testing.assert_close(gradients["crossing"][2], gradients["tap"][2])
