"""A pass of every phase before it begins: a batch that BatchNorm cannot take, and losses that teach nothing."""

from pathlib import Path
from typing import Any

import pytest

from adaptive.errors import ConfigError
from tests.training.checks.door import checked

VIT_WITH_LINKS = {"backbone": "test_vit", "exits": 2, "collaboration": True}
EARLY = {"learn": "early_exits", "epochs": 1}
# Sections, ranks, and what the line must say.
REFUSED: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "micro_batch": ({"train": {"micro_batch": 1}}, 1, ["train.micro_batch = 1", "BatchNorm", "2 images or more"]),
    "as_many_images_as_ranks": (
        {"train": {"global_batch": 4}}, 4,
        ["train.global_batch = 4 on 4 rank(s)", "model.sync_batchnorm=true", "2 ranks", "train.global_batch=8"],
    ),
    "no_power_of_two": (
        {"train": {"global_batch": 48, "micro_batch": 64}}, 48, ["train.global_batch = 48 on 48 rank(s)", "24 ranks"],
    ),
    "a_prime_share": (
        {"train": {"global_batch": 34, "micro_batch": 16}}, 2,
        ["train.micro_batch = 16", "17 images of a rank", "train.micro_batch=17"],
    ),
    "the_link_has_one_too": ({"model": VIT_WITH_LINKS, "train": {"micro_batch": 1}}, 1, ["train.micro_batch = 1"]),
    "links_alone_learn": (
        {"model": VIT_WITH_LINKS, "train": {"micro_batch": 1}, "phases": [EARLY | {"learn": "classifiers"}]}, 1,
        ["train.micro_batch = 1", "phase 'train'"],
    ),
    "early_exits_by_the_last_loss": (
        {"phases": [{**EARLY, "exit_weights": [0, 0, 1]}]}, 1,
        ["phases.0.exit_weights = [0.0, 0.0, 1.0]", "early_exits"],
    ),
    "by_the_whole_runs_weights": (
        {"train": {"exit_weights": [0, 0, 1]}, "phases": [EARLY]}, 1, ["train.exit_weights", "an exit that learns"],
    ),
    "in_the_second_phase_alone": (
        {"phases": [{"epochs": 1}, {**EARLY, "name": "two", "exit_weights": [0, 0, 1]}]}, 1, ["phases.1.exit_weights"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_phase_that_cannot_run_or_learn_is_refused(case: str, digits: Path) -> None:
    sections, ranks, parts = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        checked(digits, ranks, **sections)
    for part in parts:
        assert part in str(refusal.value)


def test_one_image_for_each_rank_is_no_statistic(digits: Path) -> None:
    """MSDNet's BatchNorm has an image's 8 x 8 values per channel, which torch takes: fewer ranks are still better."""
    small = {"base": 1, "step": 1, "channels": 4, "growth": 2}
    plain = {"model": {"backbone": "msdnet", "options": small, "exits": 2, "collaboration": False}}
    with pytest.raises(ConfigError, match=r"single image .* \(4 ranks at most\)"):
        checked(digits, 8, train={"global_batch": 8}, **plain)
    assert checked(digits, 4, train={"global_batch": 8}, **plain) == []
    assert checked(digits, 4, train={"global_batch": 8, "micro_batch": 1}, **plain) == []  # asked for, and possible


def test_torch_decides_what_a_batch_of_one_can_be(digits: Path) -> None:
    plain = {"backbone": "test_vit", "exits": 2, "collaboration": False}
    assert checked(digits, model=plain, train={"micro_batch": 1}) == []  # LayerNorm alone
    frozen = [{"learn": "exits", "collaboration": False}]
    assert checked(digits, train={"micro_batch": 1}, phases=frozen) == []  # its statistics are at rest
    shared = {"model": {"sync_batchnorm": True}, "train": {"global_batch": 4, "device": "auto"}}
    assert checked(digits, 4, **shared) == []


def test_an_exit_without_a_loss_is_told(digits: Path) -> None:
    [note] = checked(digits, model={"collaboration": False}, train={"exit_weights": [1, 0, 1]})
    assert "train.exit_weights = [1.0, 0.0, 1.0]: exit(s) 2 learn nothing" in note


def test_an_attached_link_carries_the_last_exits_loss(digits: Path) -> None:
    """What decides is the gradient, not a table: here the last exit, frozen, teaches the one before it."""
    phases = [{**EARLY, "exit_weights": [0, 0, 1]}]
    checked(digits, model={"collaboration": "attached"}, phases=phases)
