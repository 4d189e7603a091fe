"""Every recipe on 1 to 256 ranks in powers of two: each starts unchanged, or a line names the largest that works."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest

from adaptive.config.loading import load_config
from adaptive.config.sections import Config
from adaptive.data.images.transforms import Mixer
from adaptive.errors import ConfigError
from adaptive.networks.from_config import outline_network
from adaptive.training.batch import BatchSizes, batch_sizes
from adaptive.training.checks.trial import check_phases_learn
from adaptive.training.engine.settings import deepspeed_config
from adaptive.training.phases import plan_phase
from tests.configs.test_recipes import CONFIGS, MODERN, NAMES

SIZES = [2**n for n in range(9)]
REACHED = {
    "imagenet": 128,
    "tiny-imagenet": 64,
    "cifar10": 32,
    "cifar100": 32,
    "cifar10/resnet18": 64,
    "quickstart": 32,
}


def reached(name: str) -> int:
    """How many ranks a recipe reaches in SIZES: as many as get two images of its global batch."""
    stem = name.removesuffix(".yaml")
    return 256 if stem.split("/")[-1] in MODERN else REACHED.get(stem, REACHED.get(stem.split("/")[0], 0))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_starts_on_every_common_number_of_ranks(name: str) -> None:
    config = load_config(CONFIGS / name)
    for world in SIZES[: SIZES.index(reached(name)) + 1]:
        batch = batch_sizes(config, world)
        assert batch.global_batch == config.train.global_batch == world * batch.micro_batch * batch.accumulation
        assert 2 <= batch.micro_batch <= (config.train.micro_batch or batch.share)
        Mixer(config.data, 10, batch.micro_batch)
        assert deepspeed_config(config, batch)["train_micro_batch_size_per_gpu"] == batch.micro_batch


@pytest.mark.parametrize("name", NAMES)
def test_beyond_it_a_line_names_the_largest_number(name: str) -> None:
    config, most = load_config(CONFIGS / name), reached(name)
    images = config.train.global_batch // most
    for world in [world for world in (*SIZES, 512, 1024, 2048, 4096, 8192) if world > most * images]:
        with pytest.raises(ConfigError) as refusal:
            batch_sizes(config, world)
        assert f"use {config.train.global_batch // 2} ranks" in str(refusal.value)


def test_sizes_between_the_powers_of_two_are_refused_with_the_next_below() -> None:
    config = load_config(CONFIGS / "imagenet/efficientnet_b0.yaml")
    for world, below in ((20, 16), (40, 32), (100, 96), (200, 192), (500, 384)):
        with pytest.raises(ConfigError, match=f"use {below} ranks"):
            batch_sizes(config, world)
    assert batch_sizes(config, 24).micro_batch == 32  # three nodes of eight


@cache
def network(model: str) -> Any:
    names = [name for name in NAMES if load_config(CONFIGS / name).model.model_dump_json() == model]
    return outline_network(load_config(CONFIGS / names[0]), 10)


def checked(config: Config, batch: BatchSizes) -> None:
    built = network(config.model.model_dump_json())
    plans = [plan_phase(config, phase, len(built.exits)) for phase in config.resolved_phases()]
    check_phases_learn(config, batch, built, plans)


@pytest.mark.full  # builds every recipe's network
@pytest.mark.parametrize("name", NAMES)
def test_an_image_for_each_rank_is_refused_before_training(name: str) -> None:
    config = load_config(CONFIGS / name)
    world = config.train.global_batch
    if config.data.mixup or config.data.cutmix:
        with pytest.raises(ConfigError, match=f"use {world // 2} ranks"):
            batch_sizes(config, world)
        return
    checked(config, batch_sizes(config, world // 2))
    with pytest.raises(ConfigError) as refusal:
        checked(config, batch_sizes(config, world))
    assert re.search(rf"BatchNorm .* \({world // 2} ranks at most\)", str(refusal.value))
