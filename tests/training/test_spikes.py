import json
import math

import pytest
import torch

from adaptive.errors import ConfigError
from adaptive.training.spikes import ENOUGH, SpikeGuard
from tests.helpers.ranks import run_ranks
from tests.training.setups import config

pytestmark = pytest.mark.ranks


def test_a_loss_far_above_the_recent_ones_is_a_spike_and_is_not_remembered():
    guard = SpikeGuard(4)
    losses = [2.0 + 0.1 * math.sin(i) for i in range(ENOUGH)]
    assert not any(guard.is_spike(loss) for loss in losses)
    deviation = torch.tensor(losses).std().item()
    mean = sum(losses) / len(losses)
    assert guard.is_spike(mean + 4.1 * deviation)
    assert guard.is_spike(mean + 4.1 * deviation), "the first spike has widened what counts as usual"
    assert not guard.is_spike(mean + 3.9 * deviation)
    assert not guard.is_spike(-100.0)  # falling is no fault
    assert guard.count == 2


def test_too_few_losses_judge_nothing_and_losses_that_are_not_finite_are_the_engines():
    guard = SpikeGuard(1)
    assert not any(guard.is_spike(loss) for loss in [1.0] * (ENOUGH - 1) + [1e9])
    assert not guard.is_spike(float("nan"))
    assert not guard.is_spike(float("inf"))
    assert len(guard.losses) == ENOUGH


def test_the_state_survives_json():
    guard = SpikeGuard(3)
    for i in range(200):
        guard.is_spike(1 / (i + 1) + 0.1)
    other = SpikeGuard(3)
    other.load_state(json.loads(json.dumps(guard.state())))
    assert other.losses == guard.losses
    assert other.losses.maxlen == guard.losses.maxlen


def train_with_a_spike(data, folder, stage, spoiled_rank):
    """Train a little; at one step one rank's loss is multiplied. Returns weights by step and what was counted."""
    from adaptive.distributed.ranks import find_ranks
    from adaptive.training import run, spikes
    from adaptive.training.checkpoints.snapshot import whole_weights
    from adaptive.training.task import ClassificationTask
    from adaptive.training.trainer import Callback

    spikes.ENOUGH = 6
    plain = ClassificationTask.loss

    def spoiled(self, images, labels, place):
        loss = plain(self, images, labels, place)
        return loss * 50 if place[0] == 9 and place[1] == spoiled_rank else loss

    ClassificationTask.loss = spoiled
    weights, applied = {}, {}

    class Watch(Callback):
        def on_step(self, trainer):
            step = trainer.progress.step
            applied[step] = trainer.progress.phase_applied
            if step in (9, 10, 11):
                weights[step] = whole_weights(trainer.active.engine, trainer.active.network)

    tree = config(
        data, folder, model={"backbone": "test_vit", "exits": 2, "collaboration": False, "options": {"img_size": 32}},
        train={"global_batch": 32, "spike_sigma": 6.0, "zero_stage": stage, "max_steps": 13, "epochs": 1},
    )  # fmt: skip
    run.Validation = lambda _: Watch()
    run.Checkpointing = lambda _: Callback()
    run.train(run.prepare(tree, find_ranks()))
    same = all(torch.equal(weights[9][name], weights[10][name]) for name in weights[9])
    moved = any(not torch.equal(weights[10][name], weights[11][name]) for name in weights[9])
    finite = all(bool(torch.isfinite(tensor.float()).all()) for tensor in weights[11].values())
    return same, moved, finite, applied[9], applied[10], applied[13]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.full) for stage in (1, 2, 3)), 0])
def test_a_spike_on_one_rank_is_left_out_by_all_at_every_stage(digits, tmp_path, stage):
    for outcome in run_ranks(train_with_a_spike, 2, str(digits), str(tmp_path / "run"), stage, 1):
        same, moved, finite, before, at, end = outcome
        assert same, "the spike has moved the weights"
        assert moved
        assert finite
        assert (before, at, end) == (9, 9, 12)


def test_not_with_gradient_surgery(digits):
    with pytest.raises(ConfigError, match=r"train\.spike_sigma = 5 .*gradient_surgery = 'pcgrad'"):
        config(digits, train={"spike_sigma": 5.0, "gradient_surgery": "pcgrad"})
