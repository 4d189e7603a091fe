"""What stays frozen in a phase must have been loaded or learned before: else it teaches noise, and ends at chance."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from adaptive import AdaptiveNetwork, create_model
from adaptive.distributed.ranks import Ranks
from adaptive.errors import ConfigError
from adaptive.planning.checked_plan import check_plan
from adaptive.training.learner import _build_teacher
from adaptive.training.phases import plan_phase
from adaptive.training.prepared_run import Prepared
from adaptive.training.run import prepare
from adaptive.training.starting.frozen import check_frozen
from tests.training.setups import config

FROZEN_TEACHER = {"gamma": 0.5, "teacher": "frozen"}
LAST_TEACHER = {"gamma": 0.5, "teacher": "last"}
Sections = dict[str, Any]


def learn(*kinds: str | Sections) -> list[Sections]:
    return [{"epochs": 1, **({"learn": kind} if isinstance(kind, str) else kind)} for kind in kinds]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """Files of a backbone for the digits' ten classes, for nine, and without a classifier."""
    folder, files = tmp_path_factory.mktemp("weights"), {}
    for name, classes in (("ten", 10), ("nine", 9), ("headless", 0)):
        files[name] = str(folder / f"{name}.pth")
        torch.save(timm.create_model("test_resnet", num_classes=classes).state_dict(), files[name])
    return {**files, "none": None}


# weights, sections, and what the message has to name
REFUSED: dict[str, tuple[str, Sections, list[str]]] = {
    "weights of other classes": ("nine", {"phases": learn("early_exits")}, ["phases.0.learn", "last exit", "exits"]),
    "weights without classifier": ("headless", {"phases": learn("early_exits")}, ["phases.0.learn", "last exit"]),
    "learned too late": ("nine", {"phases": learn("early_exits", "all")}, ["phases.0.learn", "last exit"]),
    "a teacher whose loss does not count": (
        "nine",
        {
            "distillation": LAST_TEACHER,
            "phases": learn({"learn": "early_exits", "exit_weights": [1, 1, 0]}),
        },
        ["phases.0.learn", "last exit"],
    ),
    "exits on random blocks": ("none", {"phases": learn("exits")}, ["phases.0.learn", "backbone", "model.pretrained"]),
    "early exits on random blocks": ("none", {"phases": learn("early_exits")}, ["phases.0.learn", "backbone"]),
    "classifiers on random blocks": ("none", {"phases": learn("classifiers", "all")}, ["phases.0.learn", "backbone"]),
    "random layers under classifiers": (
        "ten",
        {"model": {"head_width": 8}, "phases": learn("classifiers")},
        ["phases.0.learn", "exit 1", "exits"],
    ),
    "early exits that never learn": ("ten", {"phases": learn("backbone")}, ["exit 1", "never", "model.exits=1"]),
    "a backbone that learns through random exits": (
        "none",
        {"phases": learn({"learn": "backbone", "exit_weights": "equal"}, "exits")},
        ["phases.0.learn", "exit 1"],
    ),
    "reset and frozen": (
        "none",
        {"phases": learn("all", {"learn": "early_exits", "reset_classifiers": True})},
        ["phases.1.learn", "last exit", "reset_classifiers"],
    ),
    "a random teacher": ("none", {"distillation": FROZEN_TEACHER}, ["distillation.teacher", "frozen"]),
    "a teacher with a random end": ("nine", {"distillation": FROZEN_TEACHER}, ["distillation.teacher", "last exit"]),
    "the last exit learned nothing before": (
        "nine",
        {"phases": learn({"learn": "all", "exit_weights": [1, 1, 0]}, "early_exits")},
        ["phases.1.learn", "last exit"],
    ),
}
ACCEPTED: dict[str, tuple[str, Sections]] = {
    "early exits on weights": ("ten", {"phases": learn("early_exits"), "distillation": LAST_TEACHER}),
    "a linear probe": ("ten", {"phases": learn("classifiers")}),
    "a probe with a new end": ("nine", {"phases": learn("classifiers", "early_exits")}),
    "a new end first": ("headless", {"phases": learn("exits", "early_exits")}),
    "disjoint": ("none", {"phases": learn("backbone", "early_exits"), "distillation": LAST_TEACHER}),
    "mixed": ("none", {"phases": learn("backbone", "all")}),
    "imta": ("none", {"distillation": FROZEN_TEACHER, "phases": learn({"distillation": False}, "exits")}),
    "imta_released": (
        "none",
        {
            "distillation": FROZEN_TEACHER,
            "phases": learn({"distillation": False}, {"learn": "classifiers", "reset_classifiers": True}),
        },
    ),
    "one phase": ("none", {"distillation": LAST_TEACHER}),
    "a loaded teacher": ("ten", {"distillation": FROZEN_TEACHER}),
    "an only exit": ("none", {"model": {"exits": 1}, "phases": learn("backbone")}),
}


@cache
def built(exits: int, head_width: int, weights: str | None) -> AdaptiveNetwork:
    return create_model("test_resnet", 10, exits, input_size=32, head_width=head_width, weights=weights)


def checked(weights: str | None, sections: Sections) -> AdaptiveNetwork:
    settings = config("unused", **sections)
    network = built(settings.model.exits, settings.model.head_width, weights)  # type: ignore[arg-type]
    plans = [plan_phase(settings, phase, len(network.exits)) for phase in settings.resolved_phases()]
    check_frozen(settings, network, plans)
    return network


def prepared(digits: Path, folder: Path, weights: str | None, sections: Sections) -> Prepared:
    model = {"weights": weights, **sections.get("model", {})}
    return prepare(config(digits, folder, **{**sections, "model": model}), Ranks())


@pytest.mark.parametrize("case", REFUSED)
def test_a_random_frozen_part_is_refused(case: str, weights: dict[str, str | None]) -> None:
    source, sections, parts = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        checked(weights[source], sections)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_was_loaded_or_learned_may_freeze(case: str, weights: dict[str, str | None]) -> None:
    source, sections = ACCEPTED[case]
    network = checked(weights[source], sections)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert network.collaboration


def test_a_run_is_refused_at_its_start(weights: dict[str, str | None], digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"phases\.0\.learn = 'early_exits': the last exit is frozen"):
        prepared(digits, tmp_path, weights["nine"], {"phases": learn("early_exits")})


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_submitted_run_is_refused_before_it_is_queued(pretrained: bool, digits: Path, tmp_path: Path) -> None:
    """Pretrained weights are not fetched for that: timm notes their number of classes."""
    model = {"backbone": "resnet10t", "pretrained": pretrained}
    settings = config(digits, tmp_path, model=model, phases=learn("early_exits"))
    with pytest.raises(ConfigError, match=f"the {'last exit' if pretrained else 'backbone'} is frozen"):
        check_plan(settings, 1, 1)


def test_a_run_that_goes_on_has_passed(existing_run: Path, digits: Path, tmp_path: Path) -> None:
    """Its weights are the checkpoint's, and the file that it began with may be gone."""
    shutil.copytree(existing_run / "checkpoints", tmp_path / "run" / "checkpoints")
    network = prepared(digits, tmp_path / "run", str(tmp_path / "gone.pth"), {"phases": learn("early_exits")}).network
    assert len(network.exits) == 3


@pytest.mark.parametrize("source", ["nine", "headless"])
def test_a_teacher_with_a_random_classifier_is_refused(
    source: str, weights: dict[str, str | None], digits: Path, tmp_path: Path
) -> None:
    teacher = {"gamma": 0.5, "teacher": "model", "teacher_model": "test_resnet", "teacher_weights": weights[source]}
    with pytest.raises(ConfigError, match=r"distillation\.teacher_weights = .*10 classes"):
        prepared(digits, tmp_path, None, {"distillation": teacher})


def test_a_pretrained_teacher_of_other_classes_is_refused(digits: Path, tmp_path: Path) -> None:
    teacher = {"gamma": 0.5, "teacher": "model", "teacher_model": "resnet18"}
    with pytest.raises(
        ConfigError, match=r"distillation\.teacher_model = 'resnet18'.*1000 classes.*10.*teacher_weights"
    ):
        prepared(digits, tmp_path, None, {"distillation": teacher})


def test_an_export_of_as_many_other_classes_is_another_networks(digits: Path, tmp_path: Path) -> None:
    """Its header names the classes: a frozen last exit, or a teacher, would answer wrongly without a word."""
    file = tmp_path / "letters.safetensors"
    about = {"backbone": "test_resnet", "step": "1", "classes": json.dumps(list("abcdefghij"))}
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict(), file, about)
    with pytest.raises(ConfigError, match=r"phases\.0\.learn = 'early_exits': the last exit is frozen"):
        prepared(digits, tmp_path, str(file), {"phases": learn("early_exits")})
    assert "other classes ('a' where this dataset has '0')" in prepared(digits, tmp_path, str(file), {}).notes[0]
    teacher = {"gamma": 0.5, "teacher": "model", "teacher_model": "test_resnet", "teacher_weights": str(file)}
    with pytest.raises(ConfigError, match=r"distillation\.teacher_weights = .*other classes \('a'"):
        prepared(digits, tmp_path, None, {"distillation": teacher})


def test_a_teacher_is_built_once(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To be checked before the ranks meet, and for every phase that it teaches in."""
    file, built, create = tmp_path / "teacher.safetensors", [], timm.create_model
    save_file(create("test_vit", num_classes=10).state_dict(), file)
    teacher = {"gamma": 0.5, "teacher": "model", "teacher_model": "test_vit", "teacher_weights": str(file)}
    given: dict[str, Any] = {"distillation": teacher, "phases": [{"epochs": 1}, {"epochs": 1}]}
    found = prepared(digits, tmp_path / "run", None, given)

    def counted(name: str, **arguments: Any) -> Any:
        built.append(name)
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", counted)
    teachers = {_build_teacher(found, plan, found.network, None) for plan in found.plans}
    assert built == []
    assert len(teachers) == 1
