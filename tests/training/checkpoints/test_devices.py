"""A checkpoint is plain tensors on the CPU: a run moves to a GPU and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.device import DeviceRank
from tests.helpers.ranks import run_ranks
from tests.training.setups import VIT, config, train_here
from tests.training.test_trainer import final, records

FILES = ("weights", "ema", "optimizer")


def _until(data: str, folder: str, steps: int) -> list[float]:
    """Train on this process's device to a step, from wherever the run stands; returns all its losses."""
    tree = config(
        data, folder, model=VIT, optimizer={"name": "adamw", "lr": 0.001},
        train={"max_steps": steps, "ema_decay": 0.9, "global_batch": 128}, tracking={"every_steps": 1},
    )  # fmt: skip
    train_here(tree)
    return [record["train/loss"] for record in records(folder) if "train/loss" in record]


@pytest.mark.device
@pytest.mark.ranks
@pytest.mark.full  # on the CPU, test_trainer.py continues runs
def test_a_run_goes_from_the_cpu_to_the_device_and_back(
    digits: Path, tmp_path: Path, device: torch.device, device_rank: DeviceRank
) -> None:
    whole, moved = str(tmp_path / "whole"), str(tmp_path / "moved")
    [expected] = run_ranks(_until, 1, str(digits), whole, 9)
    run_ranks(_until, 1, str(digits), moved, 3)
    device_rank(_until, str(digits), moved, 6)
    on_device = {name: final(moved, name) for name in FILES}
    [found] = run_ranks(_until, 1, str(digits), moved, 9)
    assert {tensor.device.type for name in FILES for tensor in on_device[name].values()} == {"cpu"}
    assert len(expected) == len(found) == 9
    if device.type == "cpu":
        assert found == expected
    assert found == pytest.approx(expected, abs=2e-3)
    for name in FILES:
        one, other = final(whole, name), final(moved, name)
        assert one.keys() == other.keys() == on_device[name].keys()
        for key in one:
            torch.testing.assert_close(other[key], one[key], rtol=2e-2, atol=2e-3, msg=f"{name} {key}")
