from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from adaptive import create_model
from adaptive.errors import ModelError
from adaptive.networks.cutting.cut import branch_points


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnt18"}, r"backbone = 'resnt18'.*did you mean .*resnet18"),
        ({"name": "hf-hub:timm/resnet18.a1_in1k"}, r"'hf-hub:timm/resnet18.a1_in1k'.*no prefix: resnet18.a1_in1k$"),
        ({"name": "hf_hub:timm/resnet18"}, r"timm's own name of it has no prefix: resnet18$"),
        ({"name": "timm/resnt18.a1_in1k"}, r"did you mean .*resnet18"),
        ({"name": "test_resnet", "exits": 0}, r"exits = 0"),
        ({"name": "test_resnet", "exits": 99}, r"exits = 99: this backbone has \d+ branch points"),
        (
            {"name": "test_resnet", "exits": ["layer9"]},
            r"'layer9': the backbone has no such module; did you mean .*layer",
        ),
        ({"name": "test_resnet", "exits": ["fc"]}, r"no exit can branch off after it; did you mean|give a number"),
        ({"name": "test_resnet", "exits": ["layer2", "layer1"]}, r"'layer1' does not come after 'layer2'"),
        ({"name": "test_resnet", "exits": ["layer1", "layer1"]}, r"'layer1' does not come after 'layer1'"),
        ({"name": "test_resnet", "num_classes": 0}, r"num_classes = 0"),
        ({"name": "test_resnet", "equilibrium": "both"}, r"equilibrium = 'both'"),
        ({"name": "test_resnet", "no_such_option": 1}, r"timm cannot build it with .*no_such_option"),
        ({"name": "test_resnet", "weights": "/nowhere.pth"}, r"no such file"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model(**{"num_classes": 3, "input_size": 64, **arguments})


def test_named_exits_are_taken() -> None:
    names = ["layer1", "layer3"]
    net = create_model("test_resnet", 3, names, input_size=64)
    assert net.exit_names == names
    assert len(net.blocks) == len(net.exits) == 3


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_starts_from_a_file(tmp_path: Path, suffix: str) -> None:
    plain = timm.create_model("test_resnet", num_classes=9)
    file = tmp_path / f"weights.{suffix}"
    if suffix == "pth":
        torch.save(plain.state_dict(), file)
    else:
        from safetensors.torch import save_file

        save_file(plain.state_dict(), file)
    same = create_model("test_resnet", 9, 2, input_size=64, weights=file).backbone_state_dict()
    assert all(torch.equal(same[name], value) for name, value in plain.state_dict().items())
    fewer = create_model("test_resnet", 4, 2, input_size=64, weights=file).backbone_state_dict()
    assert torch.equal(fewer["conv1.0.weight"], plain.state_dict()["conv1.0.weight"])
    assert fewer["fc.weight"].shape[0] == 4


def test_an_unreadable_file(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be read"):
        create_model("test_resnet", 3, 2, input_size=64, weights=file)


def test_branch_points_of_a_resnet() -> None:
    found = branch_points("test_resnet", 64)
    names = [name for name, _, _ in found]
    assert {"layer1", "layer2", "layer3"} <= set(names)
    shares = [share for _, share, _ in found]
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1
    assert ("layer1", (32, 16, 16)) in [(name, shape) for name, _, shape in found]


def test_creation_leaves_the_random_numbers_alone() -> None:
    """Recording and checking draw none: two networks from one seed agree, whatever their exits."""
    draws = []
    for exits in (1, ["layer2"]):
        torch.manual_seed(5)
        create_model("test_resnet", 3, exits, collaboration=False, input_size=64)
        draws.append(create_model("test_resnet", 3, 1, input_size=64).backbone_state_dict()["conv1.0.weight"])
    torch.manual_seed(5)
    timm.create_model("test_resnet", num_classes=3)
    direct = timm.create_model("test_resnet", num_classes=3).state_dict()["conv1.0.weight"]
    assert torch.equal(draws[0], direct)


def test_another_number_of_channels() -> None:
    net = create_model("test_resnet", 3, 2, input_size=32, in_chans=1).eval()
    assert net.channels == 1
    assert net(torch.randn(2, 1, 32, 32))[0].shape == (2, 3)


@pytest.mark.parametrize("head_width", [0, 12])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "pvt_v2_b0"])
def test_wider_heads_fit_every_layout(name: str, head_width: int) -> None:
    net = create_model(name, 3, 3, input_size=64, head_width=head_width, head_dropout=0.1)
    assert [z.shape for z in net(torch.randn(2, 3, 64, 64))] == [(2, 3)] * 3
    assert net.exits[0].classifier.in_features == head_width or net.exits[0].feature.width
