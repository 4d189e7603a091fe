"""Settings that another one leaves without use: methods are refused, the rest is told at the start."""

from pathlib import Path
from typing import Any

import pytest

from adaptive.errors import ConfigError
from tests.training.checks.door import checked

ONE = {"exits": 1, "collaboration": False}
BACKBONE = [{"learn": "backbone", "epochs": 1}]
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "teacher_of_no_phase": (
        {"distillation": {"gamma": 0.5}, "phases": [{"epochs": 1, "distillation": False}]},
        ["distillation.gamma = 0.5", "every phase has distillation: false"],
    ),
    "teacher_without_pupils": ({"distillation": {"gamma": 0.5}, "phases": BACKBONE}, ["distillation.gamma = 0.5"]),
    "one_exit_teaches_itself": ({"model": ONE, "distillation": {"gamma": 0.5}}, ["distillation.gamma=0"]),
    "drop_of_one_exit": ({"model": ONE, "train": {"exit_drop": 0.3}}, ["train.exit_drop = 0.3", "exit_drop=0"]),
    "drop_where_none_counts": ({"train": {"exit_drop": 0.3}, "phases": BACKBONE}, ["train.exit_drop = 0.3"]),
    "surgery_of_one_exit": ({"model": ONE, "train": {"gradient_surgery": "pcgrad"}}, ["gradient_surgery=none"]),
    "surgery_of_frozen_blocks": (
        {"train": {"gradient_surgery": "pcgrad"}, "phases": [{"learn": "exits", "epochs": 1}]}, ["gradient_surgery"],
    ),
    "surgery_of_one_loss": (
        {"train": {"gradient_surgery": "pcgrad", "exit_weights": [0, 0, 1]}}, ["train.gradient_surgery = 'pcgrad'"],
    ),
    "fresh_layer_that_stays": (
        {"phases": [{"learn": "early_exits", "epochs": 1, "reset_classifiers": True}]},
        ["phases.0.reset_classifiers = True", "learn: exits"],
    ),
    "width_of_no_head": ({"model": {**ONE, "head_width": 8}}, ["model.head_width = 8", "model.head_width=0"]),
    "dropout_of_no_head": ({"model": {**ONE, "head_dropout": 0.1}}, ["model.head_dropout = 0.1"]),
}  # fmt: skip
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"distillation": {"temperature": 3.0}}, "distillation.temperature = 3.0 does nothing"),
    "teacher": ({"distillation": {"teacher": "next"}}, "distillation.teacher = 'next' does nothing"),
    "teacher_model": (
        {"distillation": {"gamma": 0.5, "teacher_model": "test_resnet"}}, "distillation.teacher_model = 'test_resnet'",
    ),
    "crop_scale": ({"data": {"crop_scale": [0.5, 1.0]}}, "data.crop_scale = [0.5, 1.0] does nothing"),
    "crop_padding": ({"data": {"crop_padding": 2}}, "data.crop_padding = 2 does nothing with data.crop = 'none'"),
    "eval_crop": ({"data": {"eval_crop": 0.9}}, "data.eval_crop = 0.9 does nothing"),
    "color_jitter": (
        {"data": {"color_jitter": 0.4, "auto_augment": "rand-m9"}}, "data.auto_augment replaces it",
    ),
    "cache": ({"data": {"cache": "/tmp/x"}}, "data.cache = '/tmp/x' does nothing: it is for URLs"),
    "attempts": ({"data": {"attempts": 2}}, "data.attempts = 2 does nothing"),
    "pipe": ({"data": {"pipe": True}}, "data.pipe = True does nothing"),
    "one_rank": ({"model": {"sync_batchnorm": True}, "train": {"device": "auto"}}, "does nothing on one rank"),
    "fp16_on_a_cpu": ({"train": {"precision": "fp16", "device": "cpu"}}, "'fp16' is slow on a CPU"),
    "epochs_of_no_phase": ({"phases": [{"epochs": 1}], "train": {"epochs": 3}}, "train.epochs = 3 does nothing"),
    "weights_of_no_phase": (
        {"phases": [{"epochs": 1, "exit_weights": "equal"}], "train": {"exit_weights": "linear_up"}},
        "train.exit_weights = 'linear_up' does nothing",
    ),
    "last_only_below_a_step": ({"train": {"last_only_epochs": 0.001}}, "last_only_epochs = 0.001 does nothing in"),
    "equilibrium_of_frozen_blocks": (
        {"phases": [{"epochs": 1, "learn": "exits", "equilibrium": True}]}, "phases.0.equilibrium = True does nothing",
    ),
    "too_short_for_spikes": (
        {"train": {"spike_sigma": 4.0, "global_batch": 256}}, "train.spike_sigma = 4 does nothing",
    ),
    "unshown": ({"tracking": {"project": "mine", "tags": ["a"]}}, "tracking.tags, tracking.project: W&B shows nothing"),
    "spared_from_nothing": (
        {"optimizer": {"weight_decay": 0.0, "decay_norm_and_bias": False}}, "optimizer.decay_norm_and_bias = False",
    ),
    "attached_nowhere": ({"model": {**ONE, "collaboration": "attached"}}, "model.collaboration = 'attached' does"),
    "last_only_of_one": ({"model": ONE, "train": {"last_only_epochs": 0.5}}, "train.last_only_epochs = 0.5 does"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_method_without_use_is_refused(case: str, digits: Path) -> None:
    sections, parts = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        checked(digits, **sections)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize("case", TOLD)
def test_a_setting_without_use_is_told(case: str, digits: Path) -> None:
    sections, part = TOLD[case]
    notes = checked(digits, **sections)
    assert [note for note in notes if part in note], notes


def test_nothing_is_told_where_everything_has_its_use(digits: Path) -> None:
    assert checked(digits) == []
    assert checked(digits, distillation={"gamma": 0.5, "temperature": 3.0, "teacher": "next"}) == []
    assert checked(digits, train={"exit_drop": 0.3}) == []
    assert checked(digits, train={"gradient_surgery": "pcgrad"}) == []
