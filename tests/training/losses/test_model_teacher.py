"""A teacher from outside is fed as it was trained: its own mean, std and image size, on the device."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from adaptive.config.sections import DataConfig, DistillationConfig
from adaptive.errors import ConfigError
from adaptive.networks.weights.trained_with import as_header
from adaptive.training.losses.model_teacher import check_teacher_classes, model_teacher

CPU = torch.device("cpu")
STUDENT = DataConfig(path="d", image_size=32, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


def teacher(**given: Any) -> Any:
    settings = DistillationConfig(gamma=0.5, teacher="model", teacher_model="test_vit", **given)
    return model_teacher(settings, STUDENT, 10, CPU, nullcontext())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_its_own_mean_and_std(file: Path) -> None:
    pixels = torch.rand(4, 3, 32, 32)
    plain = timm.create_model("test_vit", num_classes=10, img_size=32, checkpoint_path=str(file)).eval()
    noted = plain.pretrained_cfg
    assert noted["mean"] != (0.1, 0.2, 0.3)
    with torch.no_grad():
        expected = plain(normalize(pixels, noted["mean"], noted["std"]))
    logits = teacher(teacher_weights=str(file))(normalize(pixels, STUDENT.mean, STUDENT.std), [])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_what_an_option_notes_counts(file: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    same = {"pretrained_cfg_overlay": {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}}
    plain = timm.create_model("test_vit", num_classes=10, img_size=32, checkpoint_path=str(file)).eval()
    with torch.no_grad():
        expected = plain(images)
    assert torch.equal(teacher(teacher_weights=str(file), teacher_options=same)(images, []), expected)


def test_its_own_image_size(file: Path, tmp_path: Path) -> None:
    """An export says its size and mean; a file of a model of fixed size is else resampled to the student's."""
    import json

    from safetensors.torch import load_file

    exported = tmp_path / "exported.safetensors"
    data = DataConfig(path="d", image_size=64, mean=STUDENT.mean, std=STUDENT.std)
    state = timm.create_model("test_vit", num_classes=10, img_size=64).state_dict()
    save_file(state, exported, {k: json.dumps(v) for k, v in as_header(data, 10).items()})
    made = teacher(teacher_weights=str(exported))
    images = torch.randn(2, 3, 32, 32)
    assert made(images, []).shape == (2, 10)
    fed = made.feed(images)
    assert fed.shape == (2, 3, 64, 64)
    assert made.network.patch_embed.img_size == (64, 64)
    fixed = teacher(teacher_weights=str(file), teacher_options={"img_size": 96})
    assert fixed.feed(images).shape == (2, 3, 96, 96)
    assert load_file(file)["pos_embed"].shape != fixed.network.pos_embed.shape


def test_a_header_of_nonsense_is_one_line(file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    other = tmp_path / "other.safetensors"
    save_file(load_file(file), other, {"data": '{"mean": "white"}'})
    with pytest.raises(ConfigError, match=r"distillation\.teacher_.*header"):
        teacher(teacher_weights=str(other))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"teacher_weights": "nowhere.pth"}, r"distillation\.teacher_weights = 'nowhere\.pth': no such file"),
        ({"teacher_model": "test_vit3x"}, r"distillation\.teacher_model = 'test_vit3x' cannot teach"),
        ({"teacher_weights": "FILE", "teacher_options": {"in_chans": 1}}, r"cannot teach 10 classes at 32 pixels"),
    ],
)
def test_mistakes_name_the_key(given: dict[str, Any], message: str, file: Path) -> None:
    values = {"teacher_model": "test_vit", **{k: str(file) if v == "FILE" else v for k, v in given.items()}}
    settings = DistillationConfig(gamma=0.5, teacher="model", **values)
    with pytest.raises(ConfigError, match=message):
        model_teacher(settings, STUDENT, 10, CPU, nullcontext())  # type: ignore[arg-type]


def test_pretrained_weights_of_other_classes_are_not_fetched_to_refuse_them() -> None:
    settings = DistillationConfig(gamma=0.5, teacher="model", teacher_model="resnet18")
    with pytest.raises(ConfigError, match="of 1000 classes, and this dataset has 10"):
        check_teacher_classes(settings, 10)
    check_teacher_classes(settings, 1000)
