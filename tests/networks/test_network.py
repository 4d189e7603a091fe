from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from adaptive import create_model
from adaptive.errors import ModelError
from tests.networks.conftest import CLASSES, build, images, plain_twin


def _macs_of_modules(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Multiply-adds of every convolution and linear layer, from weights and output shapes alone."""
    macs: dict[str, int] = {}

    def count(name: str, module: nn.Module, output: torch.Tensor) -> None:
        per_output = module.weight[0].numel()
        macs[name] = output.numel() * per_output

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda m, _i, out, name=name: count(name, m, out))
    with torch.no_grad():
        model.eval()(x)
    return macs


@pytest.mark.parametrize("family", ["resnet", "vit", "mobilenetv3", "mixer"])
def test_costs_equal_a_count_by_hand(family: str) -> None:
    net = build(family)
    macs = _macs_of_modules(plain_twin(family, net), images(net, 1))
    costs = net.costs()
    total = parameters = 0
    for i in range(3):
        owned = {
            net.names.plain.get(f"blocks.{i}.{n}.weight")
            for n, m in net.blocks[i].named_modules()
            if hasattr(m, "weight")
        }
        if i == 2:
            owned |= {
                net.names.plain.get(f"exits.2.{n}.weight")
                for n, m in net.exits[2].named_modules()
                if hasattr(m, "weight")
            }
        else:
            total += net.exits[i].feature.width * CLASSES
        if i > 0:
            total += 2 * CLASSES * net.exits[i].link.linear.out_features
        total += sum(count for name, count in macs.items() if f"{name}.weight" in owned)
        parameters += sum(p.numel() for part in (net.blocks[i], net.exits[i]) for p in part.parameters())
        assert (costs[i].macs, costs[i].parameters) == (total, parameters)
    assert costs[0].macs < costs[1].macs < costs[2].macs


def test_costs_without_collaboration_and_at_another_size() -> None:
    net = build("resnet")
    with_links, larger = net.costs(), net.costs(128)
    net.train()
    net.collaboration = False
    without = net.costs()
    for i in (1, 2):
        links = [net.exits[j].link for j in range(1, i + 1)]
        assert with_links[i].macs - without[i].macs == sum(2 * CLASSES * link.linear.out_features for link in links)
        assert with_links[i].parameters - without[i].parameters == sum(
            p.numel() for link in links for p in link.parameters()
        )
    assert larger[0].macs > 3.5 * with_links[0].macs
    assert all(module.training for module in net.modules())
    with pytest.raises(ModelError, match="input_size = 48"):
        build("vit").costs(48)


@pytest.mark.parametrize("family", ["resnet", "deit", "swin"])
def test_copies_are_independent(family: str) -> None:
    net = build(family).eval()
    twin, restored = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    x = images(net, 2)
    with torch.no_grad():
        expected = net(x)
        for other in (twin, restored):
            assert all(torch.equal(a, b) for a, b in zip(expected, other(x), strict=True))
        for parameter in twin.parameters():
            parameter.zero_()
        assert all(torch.equal(a, b) for a, b in zip(expected, net(x), strict=True))
        assert float(twin(x)[0].abs().max()) == 0
    assert set(twin.state_dict()) == set(net.state_dict())


@pytest.mark.device
@pytest.mark.parametrize("family", ["resnet", "efficientnet", "vit"])
def test_checkpointing_gives_the_same_gradients_and_statistics(family: str, device: torch.device) -> None:
    results = []
    for checkpointing in (False, True):
        net = build(family).to(device, torch.float64).train()
        net.checkpointing = checkpointing
        torch.manual_seed(1)
        sum(z.square().mean() for z in net(images(net, 3, torch.float64).to(device))).backward()
        results.append(({n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())))
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)


@pytest.mark.device
@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_channels_last_gives_the_same_logits_and_gradients(family: str, device: torch.device) -> None:
    """In fp32: other kernels, which round otherwise; a ReLU at its corner then takes the other side now and then."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        net = build(family).to(device, memory_format=layout).train()
        logits = net(images(net, 4).to(device).contiguous(memory_format=layout))
        sum(z.square().mean() for z in logits).backward()
        weights = [p for p in net.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        assert weights
        assert all(w.is_contiguous(memory_format=layout) for w in weights)
        results.append(([z.detach() for z in logits], [p.grad for p in net.parameters()]))
    for one, other in zip(*results, strict=True):
        for expected, found in zip(one, other, strict=True):
            assert float((found - expected).norm()) <= 1e-2 * float(expected.norm()) + 1e-6


@pytest.mark.parametrize(
    ("family", "scope", "checkpointing"),
    # The multiscale networks' own test compiles with crossing tensors.
    [
        pytest.param("resnet", "crossing", False, marks=[pytest.mark.full, pytest.mark.device]),
        ("resnet", False, True),
        ("vit", "tap", False),
    ],
)
def test_compiles_whole_and_only_once(
    family: str, scope: str | bool, checkpointing: bool, device: torch.device
) -> None:
    torch._dynamo.reset()
    net = build(family).to(device).train()
    net.equilibrium, net.checkpointing = scope, checkpointing
    reference = copy.deepcopy(net)
    # On a GPU what `train.compile` takes, whose fused kernels round otherwise; on the CPU that takes a minute.
    backend, margin = ("aot_eager", {}) if device.type == "cpu" else ("inductor", {"rtol": 1e-3, "atol": 1e-4})
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    for step in range(4):
        x = images(net, 2).to(device) + step
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            logits = compiled(x)
        sum(z.square().mean() for z in logits).backward()
        sum(z.square().mean() for z in reference(x)).backward()
    for (name, parameter), other in zip(net.named_parameters(), reference.parameters(), strict=True):
        if backend == "aot_eager":
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)
        else:
            far = float((parameter.grad - other.grad).norm())
            assert far <= 1e-2 * float(other.grad.norm()) + 1e-4, name
    for (name, buffer), other in zip(net.named_buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(buffer, other, msg=name, **margin)


def test_layers_are_the_plain_models() -> None:
    net = build("vit")
    plain = timm.create_model("test_vit", num_classes=CLASSES, img_size=64)
    layers = timm.models.group_parameters(plain, plain.group_matcher(), reverse=True)
    assert {net.names.plain.get(name): layer for name, layer in net.layer_ids.items()} == layers
    assert net.num_layers == max(layers.values()) + 1
    added = [name for name, _ in net.named_parameters() if name not in net.layer_ids]
    assert added
    assert all(name.startswith("exits.") for name in added)
    assert {net.names.plain.get(name) for name in net.no_weight_decay()} <= set(plain.no_weight_decay())


def test_direct_parameters_are_read_outside_their_module() -> None:
    net = build("resnet")
    assert [net.direct_parameters(i) for i in range(3)] == [[], [], []]
    inside = create_model("test_convnext", 3, ["stages.1.blocks.0.norm"], input_size=64)
    read = [p for i in range(2) for p in inside.direct_parameters(i)]
    assert len(read) == 1  # the layer scale of the opened block
    assert any(read[0] is p for n, p in inside.named_parameters() if n.endswith("gamma"))


def test_classifier_of_another_class_count() -> None:
    net = build("resnet")
    weights = timm.create_model("resnet10t", num_classes=CLASSES + 2).state_dict()
    with pytest.raises(ModelError, match=rf"num_classes = {CLASSES + 2}"):
        net.load_state_dict(weights)
