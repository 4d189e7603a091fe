"""Learning rate, moving average and loss scale follow applied steps, when others overflow or are not finite."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.device import DeviceRank
from tests.training.setups import VIT, config, train_here

DECAY, STEPS, SPOILED = 0.9, 9, (3, 6)
CASES = [
    ("fp16", 2),
    *(pytest.param(*case, marks=pytest.mark.full) for case in [("fp16", 0), ("bf16", 2), ("bf16", 3)]),
]


def _followed(data: str, folder: str, precision: str, stage: int) -> list[dict[str, Any]]:
    """Train; returns for every step whether it was applied, and what there was after it.

    Two steps are spoiled: in fp16 by a loss scale so large that activations' gradients overflow, in bf16 by a NaN.
    """
    from adaptive.training.trainer import Callback, Trainer

    found: list[dict[str, Any]] = []

    class Watch(Callback):
        def on_batch(self, trainer, batch) -> None:
            spoiled = trainer.progress.step in SPOILED
            if precision == "fp16":
                scale = 2.0**100 if spoiled else 2.0**10
                trainer.active.engine.load_loss_scale_state({"scale": scale, "good_steps": 0})
            elif spoiled:
                batch.images[0, 0, 0, 0] = float("nan")

        def on_step(self, trainer) -> None:
            active = trainer.active
            parameters = list(active.network.parameters())
            with active.engine.gathered(parameters):
                weights = [p.detach().cpu().clone() for p in parameters]
            average = list(active.learner.average.network.parameters())
            found.append(
                {
                    "applied": trainer.progress.skipped_in_row == 0,
                    "rate": active.optimizer.param_groups[0]["lr"],
                    "scale": active.engine.loss_scale,
                    "weights": weights,
                    "average": [p.detach().cpu().clone() for p in average],
                    "types": {str(p.dtype) for p in [*parameters, *average]},
                    "devices": {p.device.type for p in average},
                }
            )

    original = Trainer.__init__

    def watched(self, *arguments, **keywords) -> None:
        original(self, *arguments, **keywords)
        self.callbacks.append(Watch())

    tree = config(
        data, folder, model=VIT, schedule={"name": "cosine"},
        train={"max_steps": STEPS, "precision": precision, "zero_stage": stage, "ema_decay": DECAY, "global_batch": 64},
        tracking={"every_steps": 100, "gradient_norms": False},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "__init__", watched)
        train_here(tree)
    return found


@pytest.mark.device
@pytest.mark.ranks
@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_rate_average_and_scale_follow_applied_steps(
    precision: str, stage: int, digits: Path, tmp_path: Path, device_rank: DeviceRank, device: torch.device
) -> None:
    steps = device_rank(_followed, str(digits), str(tmp_path), precision, stage)
    assert len(steps) == STEPS
    assert [i for i, step in enumerate(steps) if not step["applied"]] == list(SPOILED)
    updates = 1
    for before, after in pairwise(steps):
        same = all(torch.equal(a, b) for a, b in zip(before["weights"], after["weights"], strict=True))
        assert same is not after["applied"]
        assert (before["rate"] == after["rate"]) is not after["applied"]
        decay = min(DECAY, (1 + updates) / (10 + updates)) if after["applied"] else 1.0
        updates += after["applied"]
        for old, weight, new in zip(before["average"], after["weights"], after["average"], strict=True):
            torch.testing.assert_close(new, decay * old + (1 - decay) * weight, rtol=1e-6, atol=1e-7)
        assert after["types"] == {"torch.float32"}, "the average follows the master weights"
        assert after["devices"] == {device.type}
        if precision == "fp16":
            assert after["scale"] == (2.0**10 if after["applied"] else 2.0**99)
        else:
            assert after["scale"] == 1
