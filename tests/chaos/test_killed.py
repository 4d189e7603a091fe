"""Ranks die by SIGKILL at random moments, and nothing is lost: neither weights, nor samples, nor records."""

import random
import signal
import time
from pathlib import Path

import pytest

from adaptive.data.reading.order import epoch_order
from adaptive.data.shards.index import load_index
from adaptive.tracking.record import read
from adaptive.training.callbacks.sample_log import consumed
from tests.chaos.runs import Life
from tests.end_to_end.test_kill_and_resume import without_clocks

pytestmark = [pytest.mark.chaos, pytest.mark.ranks]

EPOCH, EPOCHS, BATCH = 20, 8, 64
END = EPOCHS * EPOCH
KILLS = 30
MOMENTS = ("starting", "training", "saving")

# Everything random, and everything that has a memory: dropout, mixing, statistics, averages, momentum, a schedule.
CONFIG = f"""
model: {{backbone: test_resnet, exits: 2, head_dropout: 0.1, options: {{drop_path_rate: 0.2, drop_rate: 0.1}}}}
data: {{path: PATH, image_size: 24, crop_scale: [0.5, 1.0], erasing: 0.25, mixup: 0.2, workers: 1, shuffle_window: 2}}
optimizer: {{lr: 0.05}}
schedule: {{warmup_epochs: 1}}
train: {{epochs: {EPOCHS}, global_batch: {BATCH}, ema_decay: 0.9, clip_norm: 5.0, device: cpu, zero_stage: 2, seed: 3}}
distillation: {{gamma: 0.1}}
evaluate: {{batch: 100}}
checkpoint: {{every_steps: 3, keep: 3}}
tracking: {{every_steps: 1, sample_ids: true, gradient_norms: false}}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    file = tmp_path_factory.mktemp("chaos") / "run.yaml"
    file.write_text(CONFIG.replace("PATH", str(digits)))
    return file


# Every moment ten times, of either rank or both. A killed run that goes on is in training/test_streams.py, too.
@pytest.mark.full
@pytest.mark.timeout(1800)  # thirty starts
def test_killed_again_and_again_a_run_ends_as_if_nothing_had_happened(
    config: Path, digits: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Life(config, whole).finish()

    draw = random.Random(0)
    moments = [*MOMENTS] * (KILLS // len(MOMENTS))
    draw.shuffle(moments)
    in_saving = 0
    while moments or in_saving < KILLS // 6:  # so many have to fall into the writing of a checkpoint
        moment = moments.pop() if moments else "saving"  # some came too late: a write takes milliseconds
        life = Life(config, killed)
        wait_for(moment, life, draw)
        in_saving += life.writing
        assert life.step < END, "the run ended before it had been killed often enough"
        life.kill(*draw.choice([(0,), (1,), (0, 1)]))
    Life(config, killed).finish()

    name = f"checkpoints/step-{END:08d}"
    files = sorted(path.name for path in (whole / name).iterdir())
    assert "weights.safetensors" in files
    for file in files:
        assert (killed / name / file).read_bytes() == (whole / name / file).read_bytes(), f"{file} differs"
    assert without_clocks(read(killed / "metrics.jsonl")) == without_clocks(read(whole / "metrics.jsonl"))
    assert [path.name for path in (killed / "checkpoints").iterdir() if path.name.startswith(".")] == []
    expect_every_sample_once(killed, whole, digits)


def wait_for(moment: str, life: Life, draw: random.Random) -> None:
    begun = life.step
    if moment == "starting":
        time.sleep(draw.uniform(0, 3))
    elif moment == "training":
        steps = draw.randint(1, 4)
        life.until(lambda: life.step >= min(begun + steps, END - 1))
        time.sleep(draw.uniform(0, 0.06))
    else:
        life.until(lambda: life.writing and life.step > 0)
        time.sleep(draw.uniform(0, 0.01))


def expect_every_sample_once(killed: Path, whole: Path, digits: Path) -> None:
    steps = consumed(killed)
    assert steps == consumed(whole)
    info = load_index(digits).split("train")
    for epoch in range(EPOCHS):
        taken = [sample for step in range(epoch * EPOCH, (epoch + 1) * EPOCH) for sample in steps[step + 1]]
        order = epoch_order(info.counts, 3, epoch, 2).tolist()
        assert taken == order[: EPOCH * BATCH]
        left_over = order[EPOCH * BATCH :]  # less than a global batch, dropped
        assert len(left_over) < BATCH
        assert sorted(taken + left_over) == list(range(info.count))


@pytest.mark.full
def test_the_number_of_ranks_changes_between_two_steps(digits: Path, tmp_path: Path) -> None:
    """One rank, two, one again: the same ids in the same global batches, and the same losses.

    A rank holds at most 24 images, from which each start derives its own micro batch: 4 x 16 alone, 2 x 16 of two. The
    network has no BatchNorm, which sees a rank's share of the batch (the collaboration links have one).
    """
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{backbone: test_vit, exits: 2, collaboration: false, options: {{img_size: 32}}}}
data: {{path: {digits}, image_size: 32, workers: 1, shuffle_window: 2}}
optimizer: {{lr: 0.02}}
train: {{epochs: 2, global_batch: 64, device: cpu, zero_stage: 1}}
tracking: {{every_steps: 1, sample_ids: true, gradient_norms: false}}
"""
    )
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    Life(config, whole, 1).finish()
    for world, stop_at in ((1, 9), (2, 26)):
        life = Life(config, changed, world, "train.micro_batch=24")
        assert life.until(lambda stop=stop_at, life=life: life.step >= stop)
        life.send(signal.SIGUSR1)
        assert life.wait() == [75] * world, life.tail()
    Life(config, changed, 1, "train.micro_batch=24").finish()

    assert consumed(changed) == consumed(whole)
    losses = [
        [r["train/loss"] for r in read(folder / "metrics.jsonl") if "train/loss" in r] for folder in (whole, changed)
    ]
    assert len(losses[0]) == 2 * EPOCH
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
