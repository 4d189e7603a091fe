"""Whole runs with each way of weighing the exits: stopped and continued, they end as undisturbed ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tests.training.setups import VIT, config, train_here
from tests.training.test_trainer import equal, final, records

STEPS, STOP = 9, 4

# 40 steps of 32 images make an epoch of the digits; the warm-up of 6 steps ends after the stop.
METHODS: dict[str, dict[str, Any]] = {
    "plain": {},
    "last_only": {"train": {"last_only_epochs": 0.15}},
    "exit_drop": {"train": {"exit_drop": 0.5, "micro_batch": 16}},
    "pcgrad": {"train": {"gradient_surgery": "pcgrad", "micro_batch": 16, "clip_norm": 1.0}},
    "pcgrad, fp16, adamw": {
        "model": {**VIT, "exits": 3},
        "optimizer": {"name": "adamw", "lr": 0.001},
        "train": {"gradient_surgery": "pcgrad", "precision": "fp16"},
    },
    "next": {"distillation": {"gamma": 0.5, "teacher": "next"}, "data": {"mixup": 0.2, "label_smoothing": 0.1}},
    "all at once": {
        "train": {
            "exit_weights": "linear_down",
            "last_only_epochs": 0.15,
            "exit_drop": 0.3,
            "gradient_surgery": "pcgrad",
            "zero_stage": 2,
            "ema_decay": 0.9,
        },
        "distillation": {
            "gamma": 0.5,
            "teacher": "model",
            "teacher_model": "test_vit",
            "teacher_weights": "TEACHER",
            "teacher_options": {"img_size": 32},
        },
        "data": {"mixup": 0.2},
    },
}


def _tree(data: str, folder: Path, method: dict[str, Any], steps: int):
    sections = {name: dict(section) for name, section in method.items()}
    sections["train"] = {"max_steps": steps, **sections.get("train", {})}
    if "teacher_weights" in sections.get("distillation", {}):
        sections["distillation"]["teacher_weights"] = str(folder.parent / "teacher.safetensors")
    sections["tracking"] = {"every_steps": 1, "gradient_norms": False}
    return config(data, folder, **sections)


def _stopped_and_not(data: str, folder: str, names: list[str]) -> dict[str, dict[str, Any]]:
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(3)
    external = timm.create_model("test_vit", num_classes=10, img_size=32)
    torch.nn.init.normal_(external.head.weight)
    save_file(external.state_dict(), Path(folder) / "teacher.safetensors")
    found = {}
    for name in names:
        whole, broken = (Path(folder) / f"{name} {kind}" for kind in ("whole", "broken"))
        train_here(_tree(data, whole, METHODS[name], STEPS))
        for stop in (STOP, STEPS):
            train_here(_tree(data, broken, METHODS[name], stop))
        found[name] = {
            "equal": [equal(final(whole, part), final(broken, part)) for part in ("weights", "optimizer")],
            "losses": [r["train/loss"] for r in records(whole) if "train/loss" in r],
            "broken losses": [r["train/loss"] for r in records(broken) if "train/loss" in r],
        }
    return found


# All of them at once; the others join the plain run in test-all.
QUICK = ["plain", "all at once"]
OTHERS = ["plain", *(name for name in METHODS if name not in QUICK)]


@pytest.mark.ranks
@pytest.mark.full  # without these methods: test_trainer.py
@pytest.mark.parametrize("names", [QUICK, OTHERS], ids=["quick", "others"])
def test_a_stopped_run_ends_bit_for_bit_as_an_undisturbed_one(names: list[str], digits: Path, tmp_path: Path) -> None:
    found = run_ranks(_stopped_and_not, 1, str(digits), str(tmp_path), names, seconds=600)[0]
    for name, outcome in found.items():
        assert outcome["equal"] == [True, True], name
        assert outcome["losses"] == outcome["broken losses"], name
        assert len(outcome["losses"]) == STEPS
    plain = found["plain"]["losses"]
    for name in set(names) - {"plain"}:
        assert found[name]["losses"][-1] != plain[-1], f"{name} changed nothing"
    if names == QUICK:
        return
    # Surgery leaves the loss as it is and changes what is learned from it (BatchNorm sees smaller micro batches there).
    assert found["pcgrad"]["losses"][0] == pytest.approx(plain[0], rel=0.01)
    assert found["last_only"]["losses"][0] < plain[0] / 2
