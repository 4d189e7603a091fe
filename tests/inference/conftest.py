"""Exported networks and real images, shared by the tests of exporting and of running."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaptive import AdaptiveNetwork, create_model
from adaptive.config.sections import DataConfig
from adaptive.data.images.decode import decode_image
from adaptive.data.images.transforms import eval_transform
from adaptive.inference.export.export import export
from adaptive.inference.export.preprocess import Preprocess
from adaptive.inference.policy import NetworkIdentity, Policy
from adaptive.networks.weights.fingerprint import fingerprint

CLASSES = [f"digit {i}" for i in range(10)]
SIDE = 32

# Convolutions; tokens; channels last; windows; a state of which every image has 4 entries in a
# row; a state of several scales; a state of two sub-networks. Model, exits, collaboration, side, further arguments.
FAMILIES: dict[str, tuple[str, int | list[str] | None, bool, int, dict[str, Any]]] = {
    "resnet": ("test_resnet", 3, True, SIDE, {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        2,
        True,
        SIDE,
        {"embed_dim": 24, "depths": (1, 2), "num_heads": (1, 2), "window_size": 4},
    ),
    "tnt": ("tnt_s_legacy_patch16_224", ["blocks.0.attn_out"], True, SIDE, {"depth": 2, "embed_dim": 48}),
    "msdnet": ("msdnet", 2, True, SIDE, {"base": 1, "step": 1}),
    "ranet": (
        "ranet",
        None,
        False,
        SIDE,
        {"blocks": 1, "block_step": 1, "step": 1, "scales": (1, 2), "growth_factors": (2, 1)},
    ),
}


@dataclass(frozen=True)
class Exported:
    """A network, in eval mode, and the folder that it was exported to."""

    network: AdaptiveNetwork
    folder: Path
    policy: Policy


def build(family: str) -> AdaptiveNetwork:
    name, exits, collaboration, side, arguments = FAMILIES[family]
    torch.manual_seed(0)
    network = create_model(name, len(CLASSES), exits, collaboration=collaboration, input_size=side, **arguments)
    with torch.no_grad():  # some links and scales start at zero, which would hide mistakes
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def data_config() -> DataConfig:
    return DataConfig.model_validate({"path": "x", "image_size": SIDE})


def identity(family: str, network: AdaptiveNetwork) -> NetworkIdentity:
    return NetworkIdentity(backbone=FAMILIES[family][0], exits=network.exit_names, fingerprint=fingerprint(network))


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Exports a family, once."""
    done: dict[str, Exported] = {}

    def make(family: str) -> Exported:
        if family not in done:
            network = build(family)
            thresholds = [0.5] * (len(network.exits) - 1) + [-1.0]
            policy = Policy(thresholds=thresholds, network=identity(family, network))
            folder = tmp_path_factory.mktemp("exports") / family.replace(" ", "_")
            export(
                network,
                folder,
                backbone=FAMILIES[family][0],
                classes=CLASSES,
                preprocess=Preprocess.of(data_config()),
                policy=policy,
            )
            done[family] = Exported(network, folder, policy)
        return done[family]

    return make


@pytest.fixture(scope="session")
def digit_files(digits: Path) -> list[bytes]:
    """PNG files of 40 scanned digits, straight from a tar file."""
    with tarfile.open(min(digits.glob("test-*.tar"))) as tar:
        members = [member for member in tar.getmembers() if member.name.endswith(".png")]
        return [tar.extractfile(member).read() for member in members[:40]]  # type: ignore[union-attr]


@pytest.fixture(scope="session")
def digit_images(digit_files: list[bytes]) -> Tensor:
    """The digits as the evaluation of a run makes them, (40, 3, 32, 32)."""
    transform = eval_transform(data_config())
    return torch.stack([transform(decode_image(content)) for content in digit_files])
