"""Every recipe in configs/: complete, as documented, and able to take a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaptive.config.loading import differences, load_config
from adaptive.config.sections import Config
from tests.helpers.locations import REPOSITORY
from tests.helpers.ranks import run_ranks

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("parts", "sweeps"))
NAMES = [p.relative_to(CONFIGS).as_posix() for p in RECIPES]
DATASETS = ("cifar10", "cifar100", "tiny-imagenet", "imagenet")
TECHNIQUES = ("baseline", "ge", "imta", "imta_released", "imta_one_phase", "mixed", "disjoint")
MODERN = ("resnet50", "convnext_tiny", "regnety_016", "efficientnet_b0", "vit_small", "swin_tiny")

# Reduced so that a step takes a second: what remains is the recipe's own code path, with fewer and smaller layers.
SMALL: dict[str, list[str]] = {
    "msdnet": ["model.exits=3", *(f"model.options.{key}" for key in ("base=1", "step=1", "channels=4", "growth=2"))],
    "ranet": [f"model.options.{key}" for key in ("blocks=1", "step=2", "channels=4", "growth=4")],
    "imagenet/convnext_tiny": ["model.options.depths=[1, 1, 2, 1]", "model.options.dims=[8, 16, 32, 64]"],
    "imagenet/vit_small": ["model.options.depth=4", "model.options.embed_dim=48"],
    "imagenet/swin_tiny": ["model.options.depths=[1, 1, 2, 1]", "model.options.embed_dim=24"],
    "imagenet/resnet50": ["model.options.layers=[1, 1, 2, 1]"],
    "imagenet/regnety_016": [],
    "imagenet/efficientnet_b0": [],
}
SIDES = {"imagenet": 64}

# The recipes whose steps take paths of their own: every technique once, every dataset once, MSDNet with both stems,
# RANet, and timm's networks by the layout of what crosses a cut: (N, C, H, W), (N, L, C) and (N, H, W, C). The others
# differ in numbers, or combine what these hold.
QUICK = {
    *("cifar10/mixed.yaml", "tiny-imagenet/imta.yaml", "cifar10/ranet.yaml", "imagenet/imta_released.yaml"),
    *("imagenet/convnext_tiny.yaml", "imagenet/vit_small.yaml", "quickstart.yaml"),
}


def test_all_recipes_are_there() -> None:
    wanted = {f"{dataset}/{technique}.yaml" for dataset in DATASETS for technique in TECHNIQUES}
    wanted |= {f"imagenet/{name}.yaml" for name in MODERN} | {"quickstart.yaml", "cifar10/resnet18.yaml"}
    assert wanted | QUICK <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_complete(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert config.train.run_folder == f"runs/{name.removesuffix('.yaml')}"
    assert config.train.max_steps is None


def recipe(dataset: str, technique: str) -> Config:
    return load_config(CONFIGS / dataset / f"{technique}.yaml", ["train.run_folder=x"])


@pytest.mark.parametrize("dataset", DATASETS)
def test_techniques_differ_in_the_technique_alone(dataset: str) -> None:
    """Whoever compares two of them compares nothing else."""
    baseline = recipe(dataset, "baseline")
    assert set(differences(baseline, recipe(dataset, "ge"))) == {"model.equilibrium"}
    assert set(differences(baseline, recipe(dataset, "imta_one_phase"))) == {
        "model.equilibrium",
        "model.collaboration",
        "distillation.gamma",
    }
    for technique in TECHNIQUES:
        changed = differences(baseline, recipe(dataset, technique))
        assert all(key.split(".")[0] in ("model", "distillation", "phases") for key in changed), changed
        assert "model.backbone" not in changed


def test_published_schedules() -> None:
    cifar, imagenet = recipe("cifar10", "imta"), recipe("imagenet", "imta")
    assert (cifar.optimizer.lr, cifar.optimizer.momentum, cifar.optimizer.nesterov) == (0.1, 0.9, False)
    assert (cifar.optimizer.weight_decay, cifar.train.global_batch) == (1e-4, 64)
    assert cifar.schedule.milestones == [0.5, 0.75]
    assert [phase.epochs for phase in cifar.resolved_phases()] == [300, 300]
    assert (imagenet.train.global_batch, imagenet.schedule.decay_epochs, imagenet.schedule.decay_rate) == (256, 30, 0.1)
    assert [phase.epochs for phase in imagenet.resolved_phases()] == [90, 90]
    released = recipe("imagenet", "imta_released")
    assert (released.model.equilibrium, released.model.collaboration) == ("tap", "attached")
    assert released.distillation.reduction == "mean"


def overrides_for(name: str, data: Path, folder: Path) -> list[str]:
    """Reduce a recipe; the ZeRO stages take turns, so that each meets every kind of recipe."""
    stem = name.removesuffix(".yaml")
    config = load_config(CONFIGS / name)
    family = config.model.backbone.partition("_")[0]
    key = stem if stem in SMALL else family
    side = SIDES.get(stem.split("/")[0], 32)
    return [
        f"data.path={data}", "data.workers=0", f"data.image_size={side}", f"train.run_folder={folder / stem}",
        "train.device=cpu", f"train.zero_stage={NAMES.index(name) % 4}",
        "train.max_steps=1", "train.global_batch=4", "train.micro_batch=4", "evaluate.batch=8",
        "tracking.gradient_norms=false", "tracking.every_steps=1", *SMALL.get(key, []),
    ]  # fmt: skip


def step_all(names: list[str], data: str, folder: str) -> dict[str, Any]:
    """One real step, validation and checkpoint of every recipe, in one process after another's engine is gone."""
    from adaptive.training.run import Ranks, prepare, train

    losses = {}
    for name in names:
        config = load_config(CONFIGS / name, overrides_for(name, Path(data), Path(folder)))
        run = train(prepare(config, Ranks()))
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [r["train/loss"] for r in records if "train/loss" in r]
        assert list((run / "checkpoints").iterdir())
    return losses


@pytest.mark.ranks
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(sorted(QUICK), id="quick"),
        pytest.param(sorted(set(NAMES) - QUICK)[::2], id="others", marks=pytest.mark.full),
        pytest.param(sorted(set(NAMES) - QUICK)[1::2], id="more", marks=pytest.mark.full),
    ],
)
def test_every_recipe_takes_a_step(names: list[str], few_images: Path, tmp_path: Path) -> None:
    losses = run_ranks(step_all, 1, names, str(few_images), str(tmp_path), seconds=280)[0]
    assert set(losses) == set(names)
    assert all(len(found) == 1 and 0 < found[0] < 1000 for found in losses.values())


@pytest.fixture(scope="module")
def few_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, few enough that validation is no matter."""
    import numpy as np
    from PIL import Image

    from adaptive.data.packing.pack import pack

    root = tmp_path_factory.mktemp("few")
    for split, count in (("train", 8), ("val", 2), ("test", 2)):
        for label in range(4):
            folder = root / "images" / split / str(label)
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([label, number]).integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    pack(root / "images", root / "packed", workers=1, progress=False)
    return root / "packed"
