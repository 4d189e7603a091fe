"""An optimizer as it is built and steps: what does not reach it, or cannot drive it, is refused with the right key."""

from pathlib import Path
from typing import Any

import pytest

from adaptive.errors import ConfigError
from tests.training.checks.door import checked

ADAMW = {"name": "adamw", "momentum": 0.9}
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "needs_a_graph": ({"name": "adahessian"}, ["optimizer.name = 'adahessian'", "cannot be driven", "adamw"]),
    "nesterov_without_momentum": (
        {"name": "sgd", "nesterov": True, "momentum": 0.0}, ["optimizer.momentum = 0", "optimizer.nesterov = True"],
    ),
    "nesterov_by_name": ({"name": "nesterov", "momentum": 0.0}, ["optimizer.momentum = 0", "Nesterov"]),
    "momentum_that_adamw_lacks": (
        {"name": "adamw", "momentum": 0.5}, ["optimizer.momentum = 0.5 does nothing", "options={betas"],
    ),
    "eps_of_sgd": ({"name": "sgd", "options": {"eps": 1e-3}}, ["optimizer.options", "eps does nothing", "SGD"]),
    "betas_of_sgd": ({"name": "sgd", "options": {"betas": [0.9, 0.95]}}, ["betas does nothing", "SGD"]),
    "misspelt": ({**ADAMW, "options": {"bettas": [0.9, 0.95]}}, ["bettas does nothing", "did you mean betas"]),
    "rate_as_option": ({**ADAMW, "options": {"lr": 0.1}}, ["lr is set by optimizer.lr", "remove it"]),
    "decay_as_option": ({**ADAMW, "options": {"weight_decay": 0.1}}, ["is set by optimizer.weight_decay"]),
    "momentum_as_option": ({"name": "sgd", "options": {"momentum": 0.1}}, ["is set by optimizer.momentum"]),
    "nesterov_as_option": ({"name": "sgd", "options": {"nesterov": True}}, ["is set by optimizer.nesterov"]),
    "layer_decay_as_option": ({**ADAMW, "options": {"layer_decay": 0.5}}, ["is set by optimizer.layer_decay"]),
    "groups_as_option": ({**ADAMW, "options": {"filter_bias_and_bn": False}}, ["optimizer.decay_norm_and_bias"]),
    "of_whole_models": ({"name": "muon", "options": {"fallback_list": ["*"]}}, ["fallback_list does nothing here"]),
    "own_rate": (
        {"name": "adafactor", "options": {"relative_step": True, "warmup_init": True}}, ["optimizer.options"],
    ),
    "bad_value": ({**ADAMW, "options": {"betas": [2.0, 0.9]}}, ["optimizer.options", "adamw", "beta"]),
    "bad_type": ({**ADAMW, "options": {"eps": "small"}}, ["optimizer.options", "'eps': 'small'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_reach_an_optimizer_is_refused(case: str, digits: Path) -> None:
    optimizer, parts = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        checked(digits, optimizer=optimizer)
    for part in parts:
        assert part in str(refusal.value)


def test_a_run_that_has_begun_is_told_instead(digits: Path) -> None:
    """Its optimizer cannot be changed any more: a refusal would end it for good."""
    [note] = checked(digits, begun=True, optimizer={"name": "adamw", "momentum": 0.5})
    assert "optimizer.momentum = 0.5 does nothing" in note


def test_layer_decay_without_layers_is_refused(digits: Path) -> None:
    frozen = [{"learn": "exits", "epochs": 1}]
    with pytest.raises(ConfigError, match=r"optimizer\.layer_decay = 0\.5 does nothing: the backbone learns in no"):
        checked(digits, optimizer={"layer_decay": 0.5}, phases=frozen)


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb", "lion", "rmsprop", "muon", "adafactor", "kronw"])
def test_optimizers_that_can_be_driven_are_not(name: str, digits: Path) -> None:
    notes = checked(digits, optimizer={"name": name})
    assert bool(notes) == (name == "kronw")
    assert not notes or "minutes" in notes[0]


def test_options_that_reach_it_are_not(digits: Path) -> None:
    assert checked(digits, optimizer={**ADAMW, "options": {"betas": [0.9, 0.95], "eps": 1e-6}}) == []
    assert checked(digits, optimizer={"name": "sgdw", "options": {"nesterov": False}}) == []
    assert checked(digits, optimizer={"name": "sgd", "momentum": 0.5, "options": {"dampening": 0.1}}) == []
