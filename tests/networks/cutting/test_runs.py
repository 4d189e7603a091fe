"""Recordings without numbers: the same as those of real passes, and all that a large model's start computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from adaptive import create_model
from adaptive.errors import ModelError
from adaptive.networks.backbone import build_backbone
from adaptive.networks.create import outline_model
from adaptive.networks.cutting.cut import _cut, branch_points, cut
from adaptive.networks.cutting.runs import NeedsNumbersError, OutlineRuns, RealRuns, Runs
from benchmarks.shared.families import FAMILIES, Family

# Tokens with a class token; convolutions with statistics.
QUICK = ("test_vit", "test_resnet")
# And every third of the others: that the pieces compute what the model does is compared whenever one is built.
WRAPPED = [
    pytest.param(family, id=family.model, marks=[] if family.model in QUICK else pytest.mark.full)
    for number, family in enumerate(FAMILIES)
    if family.model in QUICK or (number % 3 == 0 and not family.model.endswith("_enc"))
]


def pieces(runs: Runs) -> tuple[Any, ...]:
    """Everything that a cut consists of, but for the weights."""
    try:
        with torch.random.fork_rng(devices=[]):
            found = _cut(runs, 4)
    except ModelError as error:
        return (str(error),)
    parts = [*found.blocks, found.head]
    names = [list(part.state_dict()) for part in parts]
    return [part._source for part in parts], names, found.branch_points, found.batch_dims, found.overwritten


@pytest.mark.parametrize("family", WRAPPED)
def test_an_outline_is_recorded_as_the_model_itself(family: Family) -> None:
    plain = build_backbone(family.model, family.size, num_classes=7, **family.options)
    real = RealRuns(copy.deepcopy(plain.model), plain.size, plain.channels)
    try:
        outlined = pieces(OutlineRuns(plain.model, plain.size, plain.channels))
    except NeedsNumbersError:  # it is recorded for real then
        pytest.skip("its code asks for values")
    assert outlined == pieces(real)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, torch.dtype]]:
    """Number of images, and type, of every pass of a VisionTransformer that computes."""
    seen: list[tuple[int, torch.dtype]] = []
    forward = VisionTransformer.forward_features

    def watched(self: VisionTransformer, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        if not x.is_meta:
            seen.append((len(x), x.dtype))
        return forward(self, x, *arguments, **named)

    monkeypatch.setattr(VisionTransformer, "forward_features", watched)
    return seen


def test_a_start_computes_one_image_with_the_plain_model(passes: list[tuple[int, torch.dtype]]) -> None:
    """Once in single precision, for the comparison with what was cut; recordings and costs compute nothing."""
    network = create_model("vit_tiny_patch16_224", 5, 4)
    assert passes == [(1, torch.float32)]
    for block in network.blocks:
        block.register_forward_pre_hook(_not_for_real)
    assert network.costs() == outline_model("vit_tiny_patch16_224", 5, 4).costs()


def _not_for_real(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    assert inputs[0].is_meta


def test_listing_branch_points_computes_nothing(passes: list[tuple[int, torch.dtype]]) -> None:
    assert len(branch_points("vit_tiny_patch16_224")) > 12
    assert passes == []


class AsksForValues(nn.Module):
    """Its way depends on the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(3, 4000), nn.Linear(4000, 9000), nn.Linear(9000, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.mean((2, 3)))
        return self.fc(self.second(x * 2 if bool(x.isfinite().all()) else x))


def test_a_model_that_asks_for_values_is_recorded_for_real() -> None:
    model = AsksForValues()
    with pytest.raises(NeedsNumbersError):
        OutlineRuns(model, 8, 3).survey()
    found = cut(model, ["first"], 8)
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(found.head(*found.blocks[1](*found.blocks[0](x))), model(x))


@pytest.mark.full  # 138 M parameters
def test_an_image_size_that_does_not_suit_is_told_as_ever() -> None:
    with pytest.raises(ModelError, match="the backbone does not run on images of 20 x 20 pixels"):
        create_model("vgg16", 5, 2, input_size=20)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_an_outline_leaves_the_model_as_it_was(name: str) -> None:
    model = build_backbone(name, 64, num_classes=3).model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    runs = OutlineRuns(model, 64, 3)
    runs.survey()
    runs.training(2, set())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
