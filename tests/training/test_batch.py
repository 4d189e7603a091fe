"""Batch arithmetic: the micro batch is the largest that train.micro_batch allows, on any number of ranks."""

from __future__ import annotations

import re
from typing import Any

import pytest

from adaptive.config.sections import Config
from adaptive.errors import ConfigError
from adaptive.training.batch import batch_sizes
from tests.training.setups import config

# Global batch, train.micro_batch, ranks; micro batch and accumulation.
DERIVED = {
    "one_rank_holds_it_all": ((64, None, 1), (64, 1)),
    "shared_by_ranks": ((64, None, 4), (16, 1)),
    "as_asked": ((1024, 64, 16), (64, 1)),
    "fewer_images_than_asked": ((1024, 64, 32), (32, 1)),
    "down_to_two": ((1024, 64, 512), (2, 1)),
    "no_divisor_of_the_share": ((768, 64, 8), (48, 2)),
    "no_divisor_of_the_global_batch": ((64, 48, 1), (32, 2)),
    "more_than_the_global_batch": ((32, 64, 1), (32, 1)),
    "three_each": ((768, 64, 256), (3, 1)),
    "far_below_the_limit": ((62, 30, 1), (2, 31)),
}


def tree(batch: int, micro: int | None = None, /, **data: Any) -> Config:
    return config("unused", train={"global_batch": batch, "micro_batch": micro}, data=data)


@pytest.mark.parametrize("case", DERIVED)
def test_micro_batch_is_an_upper_limit(case: str) -> None:
    (batch, micro, world), expected = DERIVED[case]
    sizes = batch_sizes(tree(batch, micro), world)
    assert (sizes.micro_batch, sizes.accumulation) == expected


def test_the_largest_that_divides_is_taken_and_told_where_it_is_not_the_asked_one() -> None:
    """Against plain counting, over everything small."""
    for mixup in (0.0, 0.2):
        for batch in range(1, 40):
            for micro in (None, 1, 3, 8, 64):
                asked = tree(batch, micro, mixup=mixup)
                for world in range(1, 14):
                    can = [
                        m for m in range(1, min(batch, micro or batch) + 1)
                        if batch % (m * world) == 0 and not (mixup and m % 2)
                    ]  # fmt: skip
                    if not can:
                        with pytest.raises(ConfigError, match=r"^train\.(global|micro)_batch = "):
                            batch_sizes(asked, world)
                        continue
                    sizes = batch_sizes(asked, world)
                    assert sizes.micro_batch == can[-1]
                    assert sizes.micro_batch * sizes.accumulation * world == batch
                    assert bool(sizes.derived) == (micro is not None and can[-1] != micro)


def test_what_differs_from_the_asked_one_is_a_line_with_both() -> None:
    for (batch, world), parts in {
        (768, 8): ["train.micro_batch = 64", "96 images", "48", "2 passes"],
        (1024, 32): ["train.micro_batch = 64", "32 images"],
    }.items():
        line = batch_sizes(tree(batch, 64), world).derived
        assert "\n" not in line
        assert [part for part in parts if part not in line] == [], line


def test_mixed_images_come_in_even_numbers() -> None:
    """mixup pairs the images of a micro batch: 3 x 2 would be refused, 2 x 3 is not."""
    assert batch_sizes(tree(6, 3), 1).micro_batch == 3
    sizes = batch_sizes(tree(6, 3, mixup=0.2), 1)
    assert (sizes.micro_batch, sizes.accumulation) == (2, 3)
    assert batch_sizes(tree(64, 63, cutmix=1.0), 1).micro_batch == 32


# Global batch, train.micro_batch, ranks, data; what the line says.
REFUSED: dict[str, tuple[tuple[int, int | None, int], dict[str, Any], list[str]]] = {
    "indivisible": ((64, None, 3), {}, ["64 is not divisible by 3 ranks", "2 ranks", "train.global_batch=63"]),
    "more_ranks_than_images": ((64, None, 128), {}, ["128 ranks", "use 32 ranks", "train.global_batch=256"]),
    "no_power_of_two": ((1024, 64, 96), {}, ["96 ranks", "use 64 ranks", "train.global_batch=1056"]),
    "no_number_gives_two_each": ((97, 64, 2), {}, ["divisible by 2 ranks; use train.global_batch=96"]),
    "odd_and_mixed": ((64, None, 64), {"mixup": 0.2}, ["64 ranks", "data.mixup", "even", "use 32 ranks"]),
    "odd_alone": ((63, None, 1), {"cutmix": 1.0}, ["train.global_batch = 63", "even", "train.global_batch=62"]),
    "limit_of_one": ((64, 1, 1), {"mixup": 0.2}, ["train.micro_batch = 1", "data.mixup", "train.micro_batch=2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_a_line_with_the_largest_number_that_can(case: str) -> None:
    (batch, micro, world), data, parts = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        batch_sizes(tree(batch, micro, **data), world)
    line = str(refusal.value)
    assert [part for part in parts if part not in line] == [], line


def test_every_remedy_works() -> None:
    """Also for BatchNorm, which wants two images or more."""
    for mixup in (0.0, 0.2):
        for batch in range(2, 40):
            for world in range(1, 50):
                asked = tree(batch, 8, mixup=mixup)
                try:
                    batch_sizes(asked, world)
                except ConfigError as refusal:
                    line = str(refusal)
                    [better] = re.findall(r"train\.global_batch=(\d+)", line)
                    assert batch_sizes(tree(int(better), 8, mixup=mixup), world).micro_batch > 1, line
                    fewer = [int(number) for number in re.findall(r"use (\d+) rank", line)]
                    works = [n for n in range(1, world) if _gives_two(asked, n)]
                    assert fewer == works[-1:], line


def _gives_two(asked: Config, world: int) -> bool:
    try:
        return batch_sizes(asked, world).micro_batch > 1
    except ConfigError:
        return False
