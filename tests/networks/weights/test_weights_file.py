"""A file of somebody's weights starts a network as timm's own pretrained weights do, in every format that is about."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adaptive import create_model
from adaptive.errors import ModelError

CLASSES = 9
SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
State = dict[str, Tensor]


@cache
def trained(name: str = "test_resnet", **arguments: Any) -> nn.Module:
    """A timm model whose every tensor differs from what a fresh one holds."""
    torch.manual_seed(7)
    model = timm.create_model(name, num_classes=arguments.pop("num_classes", CLASSES), **arguments)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def state(name: str = "test_resnet", **arguments: Any) -> State:
    return dict(trained(name, **arguments).state_dict())


def prefixed(prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state().items()}


def zeros() -> State:
    return {key: torch.zeros_like(value) for key, value in state().items()}


# What a .pth file may hold, by who wrote it.
FORMATS: dict[str, Callable[[], Any]] = {
    "plain": state,
    "timm's training script": lambda: {"epoch": 3, "arch": "test_resnet", "state_dict": state()},
    "its average": lambda: {"state_dict": zeros(), "state_dict_ema": state()},
    "DDP": lambda: prefixed("module."),
    "torch.compile": lambda: {"state_dict": prefixed("_orig_mod.")},
    "both": lambda: prefixed("module._orig_mod."),
    "Lightning": lambda: {"state_dict": prefixed("model."), "epoch": 3, "hyper_parameters": {"lr": 0.1}},
    "Lightning, compiled": lambda: {"state_dict": prefixed("model._orig_mod.")},
    "Lightning, with a criterion": lambda: {"state_dict": {**prefixed("net."), "criterion.weight": torch.ones(9)}},
    "Lightning, with an average": lambda: {
        "state_dict": {**{f"model.{key}": value for key, value in zeros().items()}, **prefixed("model_ema.module.")}
    },
    "DeepSpeed": lambda: {"module": state(), "ds_version": "0.19", "global_steps": 7, "dp_world_size": 1},
    "DeepSpeed, wrapped": lambda: {"module": prefixed("module.model.")},
    "a loop of one's own": lambda: {"model_state_dict": state(), "optimizer_state_dict": {"state": {}, "lr": 0.1}},
    "a network inside": lambda: {"net": prefixed("backbone."), "step": 4},
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(tmp_path: Path, name: str) -> None:
    file = tmp_path / "weights.pth"
    torch.save(FORMATS[name](), file)
    found = create_model("test_resnet", CLASSES, 2, input_size=32, weights=file).backbone_state_dict()
    assert [key for key, value in state().items() if not torch.equal(found[key], value)] == []


def test_prefixes_in_safetensors_too(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(prefixed("model."), file)
    found = create_model("test_resnet", CLASSES, 2, input_size=32, weights=file).backbone_state_dict()
    assert all(torch.equal(found[key], value) for key, value in state().items())


@pytest.mark.parametrize(
    ("name", "before", "now", "resized"),
    [
        ("test_vit", {"img_size": 32}, {"input_size": 64}, "pos_embed"),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, **SWIN}, {"input_size": 128, **SWIN}, "bias_table"),
    ],
)
def test_another_image_size_is_resampled_as_timm_does(
    tmp_path: Path, name: str, before: dict[str, Any], now: dict[str, Any], resized: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    file = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in trained_state(name, before).items()}, file)
    arguments = {"img_size" if key == "input_size" else key: value for key, value in now.items()}
    overlay = {"file": str(file), "num_classes": CLASSES}
    expected = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=CLASSES, **arguments
    ).state_dict()
    with caplog.at_level(logging.WARNING):
        found = create_model(name, CLASSES, 2, weights=file, **now).backbone_state_dict()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []
    [line] = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert "resized" in line
    assert resized in line


def trained_state(name: str, arguments: dict[str, Any]) -> State:
    torch.manual_seed(7)
    return dict(timm.create_model(name, num_classes=CLASSES, **arguments).state_dict())


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_rgb_weights_for_other_channels(tmp_path: Path, channels: int) -> None:
    file = tmp_path / "weights.pth"
    torch.save(state(), file)
    expected = timm.create_model(
        "test_resnet", pretrained=True, pretrained_cfg_overlay={"file": str(file), "num_classes": CLASSES},
        num_classes=CLASSES, in_chans=channels,
    ).state_dict()  # fmt: skip
    found = create_model("test_resnet", CLASSES, 2, input_size=32, weights=file, in_chans=channels)
    assert all(torch.equal(found.backbone_state_dict()[key], value) for key, value in expected.items())


def test_grey_weights_for_rgb_images(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    grey = trained_state("test_resnet", {"in_chans": 1})
    torch.save(grey, file)
    found = create_model("test_resnet", CLASSES, 2, input_size=32, weights=file).backbone_state_dict()["conv1.0.weight"]
    assert torch.allclose(found.sum(1, keepdim=True), grey["conv1.0.weight"], atol=1e-6)
    same = create_model("test_resnet", CLASSES, 2, input_size=32, weights=file, in_chans=1).backbone_state_dict()
    assert torch.equal(same["conv1.0.weight"], grey["conv1.0.weight"])


@pytest.mark.parametrize("headless", [False, True])
def test_a_head_that_does_not_fit_is_left_out_and_told(
    tmp_path: Path, headless: bool, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "weights.pth"
    torch.save({key: value for key, value in state().items() if not (headless and key.startswith("fc."))}, file)
    torch.manual_seed(1)
    fresh = create_model("test_resnet", 4, 2, input_size=32).state_dict()
    torch.manual_seed(1)
    with caplog.at_level(logging.WARNING):
        network = create_model("test_resnet", 4, 2, input_size=32, weights=file)
    found = network.backbone_state_dict()
    assert all(torch.equal(found[key], value) for key, value in state().items() if not key.startswith("fc."))
    assert torch.equal(found["fc.weight"], fresh["exits.1.head.fc.weight"])
    [line] = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert "fc.weight" in line
    assert "no classifier" in line if headless else "9 classes" in line
    assert {name.rsplit(".", 2)[1] for name in network.untrained if name.startswith("exits.1.head")} == {"fc"}
    assert not [name for name in network.untrained if name.startswith("blocks.")]


def test_missing_layers_are_refused_though_the_classes_differ(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({key: value for key, value in state().items() if not key.startswith("layer3")}, file)
    with pytest.raises(ModelError, match=r"does not fit the backbone: .*layer3"):
        create_model("test_resnet", 4, 2, input_size=32, weights=file)


def test_a_whole_network_names_the_way(tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    network = create_model("test_resnet", CLASSES, 2, input_size=32)
    save_file({key: value.clone() for key, value in network.state_dict().items()}, file)
    with pytest.raises(ModelError, match=r"whole network with its exits.*model\.from_run=RUN"):
        create_model("test_resnet", CLASSES, 2, input_size=32, weights=file)
    with pytest.raises(ModelError, match=r"is a folder.*model\.from_run"):
        create_model("test_resnet", CLASSES, 2, input_size=32, weights=tmp_path)


def test_weights_of_a_network_with_exits_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    arguments: dict[str, Any] = {"base": 1, "step": 1, "channels": 4, "exits": 2}
    source = create_model("msdnet", CLASSES, input_size=32, **arguments)
    torch.save({"module": source.backbone_state_dict()}, file)
    found = create_model("msdnet", CLASSES, input_size=64, weights=file, **arguments)
    expected = source.backbone_state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.backbone_state_dict().items())
    fewer = create_model("msdnet", 3, input_size=32, weights=file, **arguments).backbone_state_dict()
    changed = {key for key, value in fewer.items() if not torch.equal(value, expected[key])}
    assert changed == {"head.classifier.weight", "head.classifier.bias"}


def test_an_extra_class_in_front_is_left_out_as_timm_says(tmp_path: Path) -> None:
    """Some published weights have a background class, which timm's label_offset counts."""
    file = tmp_path / "weights.pth"
    source = trained_state("test_resnet", {})
    source["fc.weight"], source["fc.bias"] = torch.randn(10, source["fc.weight"].shape[1]), torch.randn(10)
    torch.save(source, file)
    overlay = {"label_offset": 1}
    found = create_model("test_resnet", 9, 2, input_size=32, weights=file, pretrained_cfg_overlay=overlay)
    assert torch.equal(found.backbone_state_dict()["fc.weight"], source["fc.weight"][1:])
