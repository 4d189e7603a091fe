"""Every family: equal to the plain timm model, whole or in stages; GE against the closed form."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.networks.conftest import CLASSES, build, images, plain_twin, taps


def test_last_logits_equal_the_plain_model(family: str) -> None:
    net = build(family)
    plain = plain_twin(family, net).eval()
    net.eval()
    net.equilibrium, net.collaboration = False, False
    for batch in (1, 4):
        x = images(net, batch)
        with torch.no_grad():
            logits, expected = net(x), plain(x)
        assert [tuple(z.shape) for z in logits] == [(batch, CLASSES)] * 3
        torch.testing.assert_close(logits[-1], expected, rtol=0, atol=1e-5 * float(expected.abs().max().clamp(min=1)))


def test_training_mode_equals_the_plain_model(family: str) -> None:
    net = build(family).train()
    net.collaboration = False
    plain = plain_twin(family, net).train()
    x = images(net, 4)
    torch.manual_seed(3)
    expected = plain(x)
    net.exits[0].drop.p = net.exits[1].drop.p = 0.0
    torch.manual_seed(3)
    torch.testing.assert_close(net(x)[-1], expected, rtol=1e-4, atol=1e-4)
    for name, buffer in plain.state_dict().items():
        torch.testing.assert_close(net.backbone_state_dict()[name], buffer)


@pytest.mark.device
def test_stages_on_a_shrinking_batch_equal_the_full_run(family: str, device: torch.device) -> None:
    net = build(family).to(device).eval()
    x = images(net, 5).to(device)
    kept = [torch.tensor([0, 2, 3], device=device), torch.tensor([2, 0], device=device), None]
    # Other batch sizes are other kernels on a GPU (Winograd's among them), which keep a digit less.
    tolerance = 1e-5 if device.type == "cpu" else 1e-4
    with torch.no_grad():
        full = net(x)
        state, previous, alive = net.start(x), None, torch.arange(5, device=device)
        for i, indices in enumerate(kept):
            state = net.run_block(i, state)
            previous = net.run_exit(i, state, previous)
            expected = full[i][alive]
            margin = tolerance * float(expected.abs().max().clamp(min=1))
            torch.testing.assert_close(previous, expected, rtol=0, atol=margin)
            if indices is not None:
                state, previous = state.select(indices, len(alive)), previous[indices]
                alive = alive[indices]


@pytest.mark.device
def test_equilibrium_is_the_mean_gradient_of_the_exits_behind(family: str, device: torch.device) -> None:
    """float64: block j's gradient is the summed loss's, from the plain model and autograd alone, / (k - j + 1)."""
    net = build(family).double().train()
    plain = plain_twin(family, net).double().train().to(device)
    net.to(device)
    x, labels = images(net, 4, torch.float64).to(device), torch.tensor([0, 3, 6, 1], device=device)

    features, final = taps(plain, net.exit_names, lambda: plain(x))
    logits: list[torch.Tensor] = []
    for i, feature in enumerate(features):
        logits.append(net.exits[i](feature, previous_logits=logits[-1] if logits else None))
    logits.append(final + net.exits[2].link(logits[-1]))
    sum(functional.cross_entropy(z, labels) for z in logits).backward()
    expected = dict(plain.named_parameters())
    exits_expected = {n: p.grad.clone() for n, p in net.exits.named_parameters() if p.grad is not None}

    net.zero_grad()
    _reset_statistics(net, plain)
    sum(functional.cross_entropy(z, labels) for z in net(x)).backward()
    for j, block in enumerate(net.blocks):
        for name, parameter in block.named_parameters():
            reference = expected[net.names.plain.get(f"blocks.{j}.{name}")].grad
            assert reference is not None, name
            scale = float(reference.abs().max()) + 1e-3
            torch.testing.assert_close(parameter.grad, reference / (3 - j), rtol=0, atol=1e-12 * max(scale, 1.0))
    for name, gradient in exits_expected.items():
        actual = dict(net.exits.named_parameters())[name].grad
        torch.testing.assert_close(actual, gradient, rtol=0, atol=1e-12 * max(float(gradient.abs().max()), 1.0))


def _reset_statistics(net: torch.nn.Module, plain: torch.nn.Module) -> None:
    for module in [*net.modules(), *plain.modules()]:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()


def test_plain_weights_load_and_come_back(family: str) -> None:
    net, other = build(family), build(family)
    plain = plain_twin(family, net)
    weights = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in plain.state_dict().items()}
    own = {name: t.clone() for name, t in other.state_dict().items() if other.names.plain.get(name) is None}
    assert other.load_state_dict(weights, strict=True).missing_keys == []
    for name, value in other.backbone_state_dict().items():
        assert torch.equal(value, weights[name])
    assert set(other.backbone_state_dict()) == set(weights)
    for name, value in own.items():
        assert torch.equal(other.state_dict()[name], value)
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(next(other.parameters()), next(net.parameters()))


def test_every_parameter_has_one_home_and_learns(family: str) -> None:
    net = build(family).train()
    homes = [id(p) for part in [*net.blocks, *net.exits] for p in part.parameters()]
    assert sorted(homes) == sorted(id(p) for p in net.parameters())
    assert len(set(homes)) == len(homes)
    sum(z.square().mean() for z in net(images(net, 3))).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@pytest.mark.device
def test_bf16_autocast_and_channels_last(family: str, device: torch.device) -> None:
    net = build(family).to(device, memory_format=torch.channels_last).train()
    x = images(net, 2).to(device).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16):
        logits = net(x)
    sum(z.float().square().mean() for z in logits).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("exits", [1, 2])
def test_fewer_exits(family: str, exits: int) -> None:
    net = build(family, exits).eval()
    x = images(net, 2)
    with torch.no_grad():
        assert len(net(x)) == exits == len(net.exit_names) + 1
