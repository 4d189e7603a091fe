"""Images are prepared as for the weights that a run begins with, unless its configuration says otherwise."""

from __future__ import annotations

import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import ImageNetInfo

import adaptive
from adaptive.config.loading import dump_config, load_config, parse_config
from adaptive.config.sections import Config
from adaptive.data.images.decode import decode_image
from adaptive.data.images.transforms import eval_transform
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.starting.settings import complete
from tests.helpers.commands import Forks
from tests.helpers.locations import DATA

LITE = "tf_efficientnet_lite0.safetensors"
IMAGENET = [0.485, 0.456, 0.406]


def tree(model: dict[str, Any], **data: Any) -> Config:
    return parse_config({"model": model, "data": {"path": "d", **data}, "train": {"run_folder": "nowhere"}})


@pytest.mark.parametrize(
    ("model", "mean", "interpolation", "eval_crop"),
    [
        ({"backbone": "vit_small_patch16_224"}, IMAGENET, "bicubic", 0.875),
        ({"backbone": "vit_small_patch16_224", "pretrained": True}, [0.5] * 3, "bicubic", 0.9),
        ({"backbone": "resnet50.tv_in1k", "pretrained": True}, IMAGENET, "bilinear", 0.875),
        ({"backbone": "resnet50", "pretrained": True}, IMAGENET, "bicubic", 0.95),
        (
            {"backbone": "vit_base_patch16_clip_224.openai", "pretrained": True},
            [0.48145466, 0.4578275, 0.40821073], "bicubic", 0.9,
        ),
        ({"backbone": "tf_efficientnet_lite0", "weights": "some.pth"}, [0.5] * 3, "bicubic", 0.875),
        ({"backbone": "msdnet", "weights": "some.pth"}, IMAGENET, "bicubic", 0.875),
    ],
)  # fmt: skip
def test_the_defaults_are_the_weights_own(
    model: dict[str, Any], mean: list[float], interpolation: str, eval_crop: float
) -> None:
    data = complete(tree(model)).data
    assert (data.mean, data.interpolation, data.eval_crop) == (mean, interpolation, eval_crop)


def test_a_contradiction_is_kept_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    settings = tree({"backbone": "vit_small_patch16_224", "pretrained": True}, mean=IMAGENET, eval_crop=0.9)
    with caplog.at_level(logging.WARNING):
        found = complete(settings)
        complete(load_as_written(found))
    assert (found.data.mean, found.data.std) == (IMAGENET, [0.5] * 3)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2, lines  # each of the two starts
    assert f"data.mean = {IMAGENET}" in lines[0]
    assert "[0.5, 0.5, 0.5]" in lines[0]
    assert "eval_crop" not in lines[0]
    assert "std" not in lines[0]


def load_as_written(settings: Config) -> Config:
    from ruamel.yaml import YAML

    return parse_config(YAML(typ="safe").load(dump_config(settings)))


def test_a_run_goes_on_with_what_it_began_with(existing_run: Path, tmp_path: Path) -> None:
    """An earlier version fed pretrained weights by the defaults: its runs are continued as they were begun."""
    folder = tmp_path / "run"
    assert CheckpointStore(existing_run / "checkpoints").all()
    folder.symlink_to(existing_run)
    settings = tree({"backbone": "vit_small_patch16_224", "pretrained": True})
    train = settings.train.model_copy(update={"run_folder": str(folder)})
    assert complete(settings.model_copy(update={"train": train})).data.mean == IMAGENET


def test_an_export_brings_its_own(existing_run: Path, tmp_path: Path, forks: Forks) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(existing_run / "checkpoints")
    text = (existing_run / "config.yaml").read_text()
    settings = load_config(existing_run / "config.yaml", ["data.mean=[0.1, 0.2, 0.3]", "data.eval_crop=0.77"])
    (run / "config.yaml").write_text(dump_config(settings))
    assert text != dump_config(settings)
    file = tmp_path / "plain.safetensors"
    assert forks.run(["checkpoint", str(run), "--export", str(file)]).code == 0
    data = complete(tree({"backbone": "test_resnet", "weights": str(file)})).data
    assert (data.mean, data.eval_crop) == ([0.1, 0.2, 0.3], 0.77)
    earlier = tmp_path / "earlier.safetensors"  # an export that does not say what it was trained with
    save_file(load_file(file), earlier, {"backbone": "test_resnet", "step": "1"})
    assert complete(tree({"backbone": "test_resnet", "weights": str(earlier)})).data.mean == IMAGENET


@pytest.mark.full  # a run of its own
def test_what_is_used_is_what_the_run_keeps(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    file = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), file)
    words = ["train", str(config_file), f"model.weights={file}", f"train.run_folder={tmp_path / 'run'}"]
    assert forks.run(words).code == 0
    trained = adaptive.load(tmp_path / "run")
    assert (trained.config.data.mean, trained.config.data.interpolation) == ([0.5] * 3, "bilinear")
    file.unlink()
    ended = forks.run([*words, "train.max_steps=2"])  # the checkpoint has the weights
    assert ended.code == 0, ended
    shown = json.loads(forks.run(["models", "test_resnet", "--json"]).out)
    assert shown["pretrained"]["mean"] == [0.5] * 3


@pytest.mark.full
@pytest.mark.skipif(not (DATA / LITE).is_file(), reason="no real weights here")
def test_real_weights_recognise_real_photos_with_their_own_mean(tmp_path: Path) -> None:
    """What the wrong normalisation costs: a tenth of the photos."""
    with tarfile.open(DATA / "imagenet-sample-125.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    photos = sorted(tmp_path.rglob("*.JPEG"))
    model = {"backbone": "tf_efficientnet_lite0", "weights": str(DATA / LITE)}
    network = adaptive.create_model(model["backbone"], 1000, 2, collaboration=False, weights=model["weights"]).eval()
    classes = ImageNetInfo().label_names()
    right = {}
    for name, data in (("own", {}), ("others", {"mean": IMAGENET, "std": [0.229, 0.224, 0.225]})):
        transform = eval_transform(complete(tree(model, **data)).data)
        with torch.no_grad():
            answers = [int(network(transform(decode_image(p.read_bytes()))[None])[-1].argmax()) for p in photos]
        right[name] = sum(classes[answer] == p.parent.name for answer, p in zip(answers, photos, strict=True))
    assert len(photos) == 125
    assert right["own"] >= 110
    assert right["others"] <= right["own"] - 8
