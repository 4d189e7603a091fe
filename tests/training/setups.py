"""Configurations and small runs that several tests share; top-level functions, so that ranks can import them."""

import os
from pathlib import Path
from typing import Any

import pytest

from adaptive.config.loading import parse_config
from adaptive.config.sections import Config
from tests.helpers.device import DEVICE_VARIABLE

VIT = {"backbone": "test_vit", "exits": 2, "collaboration": False, "options": {"img_size": 32}}
RESNET = {"backbone": "test_resnet", "exits": 3, "collaboration": True}

# DeepSpeed has one optimizer for stages 1 and 2, which differ in what becomes of gradients that nobody looks at.
STAGES = [0, pytest.param(1, marks=pytest.mark.full), 2, 3]


def config(data: Path | str, run_folder: Path | str = "unused", /, **sections: dict[str, Any]) -> Config:
    """A small run on the digits, on this process's device; ``sections`` are merged over the defaults here."""
    where = os.environ.get(DEVICE_VARIABLE, "cpu")
    tree: dict[str, Any] = {
        "model": dict(RESNET),
        "data": {"path": str(data), "image_size": 32, "crop": "none", "flip": 0.0, "eval_crop": 1.0, "workers": 0},
        "optimizer": {"lr": 0.05},
        "train": {"run_folder": str(run_folder), "epochs": 1, "global_batch": 32, "device": where},
        "evaluate": {"batch": 100},
        "tracking": {"every_steps": 5},
    }
    if where == "cuda" and sections.get("train", {}).get(
        "zero_stage"
    ):  # DeepSpeed's own bucket is 2 GiB, several times over, and a process builds fifty engines
        tree["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 4_000_000}}
    for name, section in sections.items():
        tree[name] = section if isinstance(section, list) else {**tree.get(name, {}), **section}
    return parse_config(tree)


def train_here(tree: Config) -> str:
    """Train a configuration as one of the ranks that the environment names, or alone."""
    from adaptive.distributed.ranks import find_ranks
    from adaptive.training.run import prepare, train

    return str(train(prepare(tree, find_ranks())))
