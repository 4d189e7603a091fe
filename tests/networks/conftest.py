from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from adaptive import AdaptiveNetwork, create_model

CLASSES = 7

# Small members of the families, on small images where the model allows it: name, side, further arguments.
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet": ("resnet10t", 64, {}),
    "resnext": ("resnext26ts", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "convnext": ("test_convnext", 64, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "densenet": ("densenet121", 64, {"growth_rate": 8, "block_config": (2, 2, 3, 2)}),
    "vgg": ("vgg11", 32, {"mlp_ratio": 0.02}),
    "vit": ("test_vit", 64, {}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"depth": 5, "embed_dim": 48}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        64,
        {"embed_dim": 24, "depths": (1, 1, 3, 1), "num_heads": (1, 2, 4, 8), "window_size": 4, "drop_path_rate": 0.0},
    ),
    "mixer": ("mixer_s32_224", 64, {}),
    "pvt": ("pvt_v2_b0", 64, {}),
    "nfnet": ("test_nfnet", 64, {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 64, {"depth": 4}),  # a rotary embedding without batch crosses too
    "crossvit": ("crossvit_tiny_240", 240, {"depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))}),  # two branches cross
}


@cache
def _pristine(family: str, exits: int, collaboration: bool) -> AdaptiveNetwork:
    name, size, arguments = FAMILIES[family]
    torch.manual_seed(0)
    net = create_model(name, CLASSES, exits, collaboration=collaboration, input_size=size, **arguments)
    with torch.no_grad():  # some heads and scales start at or near zero, which would hide mistakes
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def build(family: str, exits: int = 3, collaboration: bool = True) -> AdaptiveNetwork:
    return copy.deepcopy(_pristine(family, exits, collaboration))


def plain_twin(family: str, net: AdaptiveNetwork) -> nn.Module:
    """The timm model itself, made by timm alone, with the network's weights."""
    name, size, arguments = FAMILIES[family]
    try:
        model = timm.create_model(name, num_classes=CLASSES, img_size=size, **arguments)
    except TypeError:
        model = timm.create_model(name, num_classes=CLASSES, **arguments)
    model.load_state_dict(net.backbone_state_dict(), strict=True)
    return model


def images(net: AdaptiveNetwork, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, net.input_size, net.input_size, generator=generator, dtype=dtype)


# Families whose cuts differ in kind: what crosses is (N, C, H, W), (N, L, C) or (N, H, W, C); convolutions and
# BatchNorm; norms in the head; two classifiers; a tensor without a batch that crosses too; two branches that both do.
# The others are cut as one of these is.
QUICK = ("resnet", "convnext", "vit", "deit", "swin", "eva", "crossvit")


@pytest.fixture(params=[name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def taps(model: nn.Module, names: list[str], run: Callable[[], Tensor]) -> tuple[list[Tensor], Tensor]:
    """Outputs of named modules of the plain model during a run, and what the run returns."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out))
        for name in names
    ]
    result = run()
    for handle in handles:
        handle.remove()
    return [found[name] for name in names], result
