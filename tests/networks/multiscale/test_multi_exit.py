"""MSDNet and RANet as adaptive networks and as timm models, beyond the reference numbers."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from adaptive import AdaptiveNetwork, create_model
from adaptive.errors import ModelError
from adaptive.networks.multiscale.presets import MSDNETS, RANETS
from tests.helpers.waiting import PATIENCE

SMALL: dict[str, dict[str, Any]] = {
    "msdnet": {"exits": 3, "base": 2, "step": 2, "channels": 4, "growth": 2},
    "msdnet_min": {"exits": 3, "base": 2, "step": 1, "step_mode": "lin_grow", "channels": 4, "growth": 4,
                   "prune": "min"},
    "msdnet_imagenet": {"exits": 3, "base": 2, "step": 1, "channels": 4, "growth": 2, "stem": "imagenet",
                        "growth_factors": (1, 2, 4, 4), "input_size": 64},
    "ranet": {"blocks": 1, "block_step": 1, "step": 2, "channels": 4, "growth": 4, "scales": (1, 2, 2)},
}  # fmt: skip
CLASSES = 5


@cache
def _pristine(kind: str, collaboration: bool) -> AdaptiveNetwork:
    torch.manual_seed(0)
    settings = {"input_size": 32, **SMALL[kind]}
    return create_model(kind.partition("_")[0], CLASSES, collaboration=collaboration, **settings)


def build(kind: str, collaboration: bool = True) -> AdaptiveNetwork:
    return copy.deepcopy(_pristine(kind, collaboration))


def images(network: AdaptiveNetwork, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, network.input_size, network.input_size, generator=generator, dtype=dtype)


def loss_of(logits: list[Tensor]) -> Tensor:
    labels = torch.arange(len(logits[0])) % CLASSES
    return torch.stack([F.cross_entropy(z, labels) for z in logits]).sum()


# Pruning and the stem show in the numbers, at which the reference tests look, and not in the paths taken here.
@pytest.fixture(params=[n if n in ("msdnet", "ranet") else pytest.param(n, marks=pytest.mark.full) for n in SMALL])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_timm_builds_the_deepest_path_and_weights_move_both_ways(kind: str) -> None:
    network = build(kind, collaboration=False).eval()
    settings = {k: v for k, v in SMALL[kind].items() if k != "input_size"}
    plain = timm.create_model(kind.partition("_")[0], num_classes=CLASSES, **settings).eval()
    plain.load_state_dict(network.backbone_state_dict(), strict=True)
    x = images(network, 2)
    with torch.no_grad():
        torch.testing.assert_close(network(x)[-1], plain(x), rtol=0, atol=1e-6)
        assert plain.forward_head(plain.forward_features(x), pre_logits=True).shape == (2, plain.num_features)
    other = build(kind)
    assert other.load_state_dict(plain.state_dict(), strict=True).missing_keys == []
    assert torch.equal(other.blocks[0].stem.scales[-1].conv.weight, plain.blocks[0].stem.scales[-1].conv.weight)
    plain.reset_classifier(0)
    assert plain(x).shape == (2, plain.num_features)
    assert network.num_layers == len(network.blocks) + 2  # stem, blocks, head


def test_every_parameter_has_one_home(kind: str) -> None:
    network = build(kind)
    homes = [id(p) for part in [*network.blocks, *network.exits] for p in part.parameters()]
    assert sorted(homes) == sorted(id(p) for p in network.parameters())
    assert len(set(homes)) == len(homes)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
def test_crossing_equilibrium_is_the_mean_gradient_of_the_exits_behind(
    kind: str, checkpointing: bool, parts: int
) -> None:
    """Also with recomputed blocks, and with gradients accumulated over parts of the batch (BatchNorm in eval mode)."""
    network = build(kind).double().train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    network.checkpointing = checkpointing
    x = images(network, 4, torch.float64)
    gradients = {}
    for scope in (False, "crossing"):
        network.equilibrium = scope  # type: ignore[assignment]
        network.zero_grad()
        for part in x.chunk(parts):
            (loss_of(network(part)) / parts).backward()
        gradients[scope] = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    k = len(network.blocks)
    assert set(gradients[False]) == set(gradients["crossing"])
    for name, plain in gradients[False].items():
        part_name, number = name.split(".")[:2]
        expected = plain / (k - int(number)) if part_name == "blocks" else plain
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(gradients["crossing"][name], expected, rtol=0, atol=1e-12 * scale)


def test_equilibrium_against_finite_differences() -> None:
    """Block j's gradient is the slope of the mean loss of the exits at or behind it."""
    network = build("msdnet", collaboration=False).double().eval()
    x = images(network, 2, torch.float64)
    loss_of(network(x)).backward()
    k = len(network.blocks)
    labels = torch.arange(2) % CLASSES
    for j, block in enumerate(network.blocks):
        parameter = next(p for p in block.parameters() if p.dim() == 4)
        direction = torch.randn_like(parameter)
        slopes = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-7)
                losses = [F.cross_entropy(z, labels) for z in network(x)[j:]]
                slopes.append(float(torch.stack(losses).sum()) / (k - j))
                parameter.sub_(direction, alpha=sign * 1e-7)
        assert float((parameter.grad * direction).sum()) == pytest.approx((slopes[0] - slopes[1]) / 2e-7, rel=1e-5)


def test_equilibrium_in_bf16(kind: str) -> None:
    """Autocast keeps 8 bits of mantissa; after that many layers a block's gradient is right to about 10 %."""
    network = build(kind).train()
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    x, k = images(network, 4), len(network.blocks)
    gradients = {}
    for scope in (False, "crossing"):
        network.equilibrium = scope  # type: ignore[assignment]
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(x)
        loss_of([z.float() for z in logits]).backward()
        gradients[scope] = [
            torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None]) for block in network.blocks
        ]
    for j, (plain, equalised) in enumerate(zip(gradients[False], gradients["crossing"], strict=True)):
        error = (equalised * (k - j) - plain).norm() / plain.norm()
        assert float(error) < 0.1


@pytest.mark.full  # other networks: test_network.py
def test_compiles_whole_and_only_once() -> None:
    network = create_model("msdnet", CLASSES, 2, base=1, step=1, channels=4, growth=2, growth_factors=(1, 2)).train()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step >= 2):
            loss_of(compiled(images(network, 4))).backward()


def test_lazy_evaluation_gives_the_same_logits_for_less(kind: str) -> None:
    network = build(kind).eval()
    x = images(network, 4)
    with torch.no_grad():
        expected = network(x)
        state, previous, left = network.start(x), None, torch.arange(4)
        for i in range(len(network.blocks)):
            state = network.run_block(i, state, lazy=True)
            previous = network.run_exit(i, state, previous)
            torch.testing.assert_close(previous, expected[i][left], rtol=0, atol=1e-5)
            if i < 2:  # one sample leaves: what had been put off is computed for the others only
                state = state.select(torch.arange(1, len(left)), len(left))
                previous, left = previous[1:], left[1:]
    full, lazy = network.costs(), network.costs(lazy=True)
    assert all(a.macs <= b.macs for a, b in zip(lazy, full, strict=True))
    if kind.startswith("msdnet"):
        assert lazy[0].macs < full[0].macs
    assert [c.parameters for c in lazy] == [c.parameters for c in full]


def test_lazy_evaluation_of_a_published_network() -> None:
    """MSDNet saves 11 % at its first exit and nothing at its last, where one scale is left."""
    network = create_model("msdnet_cifar_anytime", 100, collaboration=False)
    full, lazy = network.costs(), network.costs(lazy=True)
    saved = [1 - a.macs / b.macs for a, b in zip(lazy, full, strict=True)]
    assert saved[0] == pytest.approx(0.114, abs=0.001)
    assert saved[-1] == 0


PUBLISHED = {  # exits, multiply-adds of the first and last in millions
    "msdnet_cifar_anytime": (7, 15, 75),
    "msdnet_cifar_growth16": (7, 56, 340),
    "msdnet_imagenet_step4": (5, 337, 1356),
    "ranet_cifar": (6, 8, 59),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_networks(name: str) -> None:
    exits, first, last = PUBLISHED[name]
    costs = create_model(name, 1000 if "imagenet" in name else 100, collaboration=False).costs()
    assert len(costs) == exits
    assert [round(c.macs / 1e6) for c in (costs[0], costs[-1])] == [first, last]


def test_features_of_the_imagenet_networks_are_derived() -> None:
    """The widths that the released code writes down by hand, for the steps that it knows."""
    widths = {
        "msdnet_imagenet_step6": [512, 544, 496, 880, 792],
        "msdnet_imagenet_step7": [576, 640, 608, 528, 976],
    }
    for name, expected in widths.items():
        with torch.device("meta"):
            assert timm.create_model(name).exit_channels == expected


@pytest.mark.parametrize("name", [*MSDNETS, *RANETS])
def test_every_preset_is_registered(name: str) -> None:
    assert timm.is_model(name)


ORDERS = """
import os, sys

def in_a_fork(code):
    if os.fork() == 0:
        exec(code)
        os._exit(0)
    assert os.wait()[1] == 0

in_a_fork("import adaptive; assert not {'timm', 'torch'} & set(sys.modules)")
import torch, torchvision  # which take most of the time that timm takes
for order in ("adaptive, timm", "timm, adaptive"):
    in_a_fork(f"import {order}; assert timm.is_model('msdnet_cifar_anytime') and timm.is_model('ranet')")
"""


@pytest.mark.full
def test_timm_knows_the_networks_in_any_order_of_imports() -> None:
    subprocess.run([sys.executable, "-c", ORDERS], check=True, timeout=PATIENCE)


@pytest.mark.parametrize("size", [16, 33, 48, 64])
def test_any_image_size(size: int) -> None:
    network = create_model("msdnet_cifar_budgeted", 10, input_size=size).eval()
    assert network.input_size == size
    with torch.no_grad():
        assert all(z.shape == (1, 10) for z in network(torch.randn(1, 3, size, size)))


def test_head_dropout_and_one_exit() -> None:
    network = create_model("msdnet", 10, 1, head_dropout=0.5, base=2, channels=4, growth=2)
    assert len(network.exits) == 1
    assert network.exits[0].drop.p == 0.5
    assert network.exits[0].link is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"stem": "imagnet"}, "stem = 'imagnet'"),
    ({"step_mode": "lg"}, "step_mode = 'lg'"),
    ({"prune": "none"}, "prune = 'none'"),
    ({"growth": 3, "growth_factors": (1, 1)}, "growth = 3 .* even"),
    ({"growth_factors": (1, 2.5)}, "growth_factors = \\(1, 2.5\\)"),
    ({"bottleneck_factors": (1,)}, "bottleneck_factors = \\(1,\\): give 3"),
    ({"base": 0}, "base = 0"),
    ({"reduction": 1.5}, "reduction = 1.5"),
    ({"exits": ["blocks.1"]}, "follow its blocks"),
    ({"head_width": 3}, "head_channels"),
    ({"pretrained": True}, "no pretrained weights"),
    ({"grow": 3}, "grow is no setting of MSDNet; did you mean growth"),
    ({"init": "zeros"}, "init = 'zeros'"),
    ({"collaboration": "attach"}, "collaboration = 'attach'"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("msdnet", 10, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scales": (2, 1, 3)}, "scales = "),
        ({"exits": 5}, "make 6 exits"),
        ({"compress": 0.01}, "compress = 0.01"),
        ({"growth_factors": (4, 2)}, "growth_factors = \\(4, 2\\): give 3"),
    ],
)
def test_wrong_arguments_of_ranet_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("ranet", 10, **arguments)
