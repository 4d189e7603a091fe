"""Runs from memory are runs from shards, bit for bit; and runs that earlier versions began keep their draws."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.data.images.transforms import train_transform
from adaptive.data.reading.order import locate
from adaptive.data.reading.stream import TrainStream
from adaptive.data.seeding import AUGMENT, seeded
from adaptive.data.shards.cache import shard_files
from adaptive.data.shards.index import load_index
from adaptive.data.shards.reader import ShardReader
from adaptive.errors import CheckpointError
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.preflight import recorded_draws
from tests.chaos.runs import Life
from tests.helpers.commands import Forks
from tests.helpers.ranks import run_ranks
from tests.training.setups import config

OLD = Path(__file__).parents[1] / "old_artefacts"
STEPS = 50

# An epoch of 20 steps; crop and flip, which memory makes of whole batches, and what happens to batches later.
CONFIG = f"""
model: {{backbone: test_resnet, exits: 2, options: {{channels: [8, 8, 8, 8], stem_width: 8}}}}
data: {{path: PATH, image_size: 8, crop: pad, crop_padding: 2, mixup: 0.2, label_smoothing: 0.1, workers: 0}}
optimizer: {{lr: 0.05}}
train: {{epochs: 3, max_steps: {STEPS}, global_batch: 64, ema_decay: 0.9, device: cpu}}
evaluate: {{batch: 100}}
checkpoint: {{every_steps: 9}}
tracking: {{every_steps: 5, system_seconds: 0, gradient_norms: false}}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    file = tmp_path_factory.mktemp("memory") / "run.yaml"
    file.write_text(CONFIG.replace("PATH", str(digits)))
    return file


@pytest.fixture(scope="module")
def from_shards(file: Path) -> Callable[[int], Path]:
    """A whole run from shards, on so many ranks."""

    def run(world: int) -> Path:
        folder = file.with_name(f"shards{world}")
        if not folder.exists():
            Life(file, folder, world).finish()
        return folder

    return run


def expect_same_end(one: Path, other: Path) -> None:
    name = f"checkpoints/step-{STEPS:08d}"
    for tensors in ("weights", "ema", "optimizer"):
        first, second = ((folder / name / f"{tensors}.safetensors").read_bytes() for folder in (one, other))
        assert first == second, tensors


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "workers", "killed"),
    [(1, 0, True), (2, 1, False), pytest.param(2, 0, True, marks=pytest.mark.full)],
)
def test_a_run_from_memory_ends_with_the_weights_of_one_from_shards(
    world: int, workers: int, killed: bool, file: Path, from_shards: Callable[[int], Path], tmp_path: Path
) -> None:
    before = set(Path("/dev/shm").glob("adaptive*"))
    folder, words = tmp_path / "run", ("data.in_memory=true", f"data.workers={workers}")
    if killed:
        life = Life(file, folder, world, *words)
        assert life.until(lambda: life.step >= 25), "it ended before it was killed"
        life.kill()
    Life(file, folder, world, *words).finish()
    expect_same_end(from_shards(world), folder)
    assert set(Path("/dev/shm").glob("adaptive*")) == before


def _open(data: str, folder: str, apart: bool, image_size: int = 8) -> dict[str, Any] | str:
    """Open the streams of a run; return what this rank decoded and what it maps, or the error that it met.

    ``apart``: as if the ranks were on machines of their own.
    """
    import torch.distributed as dist

    from adaptive.data.reading import in_memory
    from adaptive.distributed.ranks import find_ranks
    from adaptive.errors import AdaptiveError
    from adaptive.training import streams
    from adaptive.training.engine.group import init_distributed
    from adaptive.training.run import prepare

    decoded = 0

    def decode(image: bytes) -> Any:
        nonlocal decoded
        decoded += 1
        return once(image)

    once, in_memory.decode_image = in_memory.decode_image, decode
    prepared = prepare(config(data, folder, data={"image_size": image_size, "in_memory": True}), find_ranks())
    init_distributed()
    if apart:
        streams._memory_place = lambda: (str(prepared.ranks.rank), 0)
    try:
        opened = streams.Streams.open(prepared)
    except AdaptiveError as error:
        return str(error)
    batches = [*opened.train.batches(0, 2), *opened.validation]
    split = opened.train._decoded
    assert split is not None
    if prepared.ranks.rank == 0:
        split.pixels[-1] = 99
    dist.barrier()
    return {"decoded": decoded, "last": int(split.pixels[-1].min()), "ids": [batch.ids.tolist() for batch in batches]}


@pytest.mark.ranks
@pytest.mark.parametrize("apart", [False, True])
def test_ranks_of_a_machine_share_what_one_of_them_decodes(apart: bool, digits: Path, tmp_path: Path) -> None:
    found = run_ranks(_open, 2, str(digits), str(tmp_path), apart)
    index = load_index(digits)
    images = index.split("train").count + index.split("val").count
    assert [one["decoded"] for one in found] == [images, images if apart else 0]
    assert [one["last"] == 99 for one in found] == [True, not apart]
    first, second = ({i for batch in one["ids"][:2] for i in batch} for one in found)
    assert not first & second


@pytest.mark.ranks
def test_all_ranks_end_with_the_error_of_the_one_that_decodes(digits: Path, tmp_path: Path) -> None:
    one, other = run_ranks(_open, 2, str(digits), str(tmp_path), False, 32)
    assert one == other
    assert "data.image_size = 32, but an image of split 'train' has 8 x 8 pixels" in one


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"image_size": 32}, "data.image_size = 32, but an image of split 'train' has 8 x 8 pixels"),
        pytest.param({"crop": "resize"}, "data.crop = 'resize'", marks=pytest.mark.full),
    ],
)
def test_what_memory_cannot_hold_is_one_line_before_training(
    changes: dict[str, Any], named: str, file: Path, forks: Forks, tmp_path: Path
) -> None:
    words = [f"data.{key}={value}" for key, value in changes.items()]
    ended = forks.run(["train", str(file), f"train.run_folder={tmp_path}", "data.in_memory=true", *words])
    assert named in ended.error_line()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_run_of_an_earlier_version_is_not_taken_into_memory(forks: Forks, tmp_path: Path) -> None:
    for name in ("dataset", "run"):
        shutil.copytree(OLD / name, tmp_path / name)
    ended = forks.start(["train", "run/config.yaml", "data.in_memory=true"], cwd=tmp_path).wait()
    line = ended.error_line()
    assert "data.in_memory = true" in line
    assert "data.in_memory=false" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (OLD / "run" / "metrics.jsonl").read_bytes()


def test_what_a_checkpoint_does_not_know_is_refused(tmp_path: Path) -> None:
    class Saved:
        path = tmp_path

        def __init__(self, **state: str) -> None:
            self.state = lambda: state

    assert recorded_draws(None) == "epoch"
    assert recorded_draws(Saved()) == "sample"  # type: ignore[arg-type]
    assert recorded_draws(Saved(drawn_by="epoch")) == "epoch"  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"by 'moon', which this version does not know"):
        recorded_draws(Saved(drawn_by="moon"))  # type: ignore[arg-type]
    [old] = CheckpointStore(OLD / "run" / "checkpoints").all()
    assert recorded_draws(old) == "sample"


@pytest.mark.parametrize("crop", ["pad", "none"])
def test_earlier_draws_are_every_images_own(crop: str, digits: Path) -> None:
    data = config(digits, data={"image_size": 8, "crop": crop, "flip": 0.5, "crop_padding": 2}).data
    index = load_index(digits)
    info = index.split("train")

    def batch(drawn_by: Any) -> Any:
        stream = TrainStream(index, data, "train", seed=7, global_batch=32, micro_batch=32, drawn_by=drawn_by)
        return next(stream.batches(stream.steps_per_epoch, stream.steps_per_epoch + 1))

    found = batch("sample")
    transform = train_transform(data)
    reader = ShardReader(shard_files(str(digits), index, data), info.shards, capacity=4)
    for image, identity in zip(found.images, found.ids.tolist(), strict=True):
        (shard,), (position,) = locate(torch.tensor([identity]).numpy(), info.counts)
        with seeded(AUGMENT, 7, 1, identity):
            assert torch.equal(image, transform(reader.read(int(shard), int(position)).image))
    reader.close()
    assert not torch.equal(batch("epoch").images, found.images)
