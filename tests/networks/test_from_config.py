"""What a configuration's network is refused for: options that another key owns or timm leaves aside, other channels."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive.config.sections import ModelConfig
from adaptive.errors import ModelError
from adaptive.networks.from_config import build_network, outline_network
from tests.training.setups import config

OWNERS = {
    "num_classes": (3, "model.num_classes"),
    "exits": (2, "model.exits"),
    "pretrained": (True, "model.pretrained"),
    "weights": ("x.pth", "model.weights"),
    "checkpoint_path": ("x.pth", "model.weights"),
    "input_size": (64, "data.image_size"),
    "equilibrium": (False, "model.equilibrium"),
    "collaboration": (False, "model.collaboration"),
    "head_width": (8, "model.head_width"),
    "name": ("resnet18", "model.backbone"),
    "model_name": ("resnet18", "model.backbone"),
}


def build(backbone: str, options: dict[str, Any]) -> None:
    build_network(config("unused", model={"backbone": backbone, "exits": 2, "options": options}), 10)


@pytest.mark.parametrize("key", OWNERS)
@pytest.mark.parametrize("backbone", ["test_resnet", "msdnet"])
def test_an_option_that_a_key_owns_is_refused(key: str, backbone: str) -> None:
    value, owner = OWNERS[key]
    with pytest.raises(ModelError) as refusal:
        build(backbone, {key: value})
    for part in (f"model.options.{key} = {value!r}", f"is set by {owner}", "remove it"):
        assert part in str(refusal.value)


def test_every_key_of_the_section_is_covered() -> None:
    for key in set(ModelConfig.model_fields) - {"backbone", "options"}:
        with pytest.raises(ModelError, match=rf"model\.options\.{key} = 1 is set by model\.{key}"):
            build("test_resnet", {key: 1})


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("test_resnet", {"bogus": None}, r"model\.options\.bogus = None does nothing"),
        ("test_vit", {"img_size": 64}, r"model\.options\.img_size = 64 is not data\.image_size = 32"),
        ("test_resnet", {"bogus": 1}, r"backbone = 'test_resnet'.*'bogus': 1.*unexpected keyword"),
        ("test_resnet", {"drop_path_rate": "high"}, r"'drop_path_rate': 'high'"),
        ("msdnet", {"growth": "many"}, r"growth = 'many': give a whole number"),
        ("msdnet", {"grwth": 4}, r"grwth"),
    ],
)
def test_options_that_do_not_fit_are_named(backbone: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(backbone, options)


@pytest.mark.parametrize("channels", [1, 2, 4, "3"])
@pytest.mark.parametrize("build", [build_network, outline_network])
@pytest.mark.parametrize("backbone", ["test_resnet", "msdnet"])
def test_other_channels_than_rgb_are_refused(channels: Any, build: Any, backbone: str) -> None:
    tree = config("unused", model={"backbone": backbone, "options": {"in_chans": channels}})
    with pytest.raises(ModelError, match=rf"model\.options\.in_chans = {channels!r}: images are decoded as RGB"):
        build(tree, 10)


def test_a_backbone_that_notes_other_channels_is_refused() -> None:
    overlay = {"pretrained_cfg_overlay": {"input_size": (1, 32, 32)}}
    tree = config("unused", model={"options": overlay})
    with pytest.raises(ModelError, match="takes images of 1 channels"):
        build_network(tree, 10)
    assert build_network(config("unused", model={"options": {**overlay, "in_chans": 3}}), 10).channels == 3


@pytest.mark.parametrize("build", [build_network, outline_network])
def test_pretrained_weights_that_timm_lacks_are_refused(build: Any) -> None:
    """timm itself begins with random ones, and a line in its log."""
    tree = config("unused", model={"backbone": "coatnet_0_224", "exits": 2, "pretrained": True})
    with pytest.raises(ModelError, match=r"model\.pretrained = true: there are no pretrained weights of coatnet_0_224"):
        build(tree, 10)


def test_planning_refuses_pretrained_weights_that_do_not_exist() -> None:
    tree = config("unused", model={"backbone": "resnet10t", "exits": 2, "pretrained": True})
    assert "blocks.0.0.weight" not in outline_network(tree, 1000).untrained
    with pytest.raises(ModelError, match=r"model\.pretrained = true: there are no pretrained weights of msdnet"):
        outline_network(config("unused", model={"backbone": "msdnet", "pretrained": True}), 10)
