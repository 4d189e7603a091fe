"""Saving beside the training: what it holds, what it waits for, and what becomes of a run whose disk fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch

from adaptive.config.sections import CheckpointConfig
from adaptive.errors import MachineError
from adaptive.training.checkpoints.saver import Saver
from adaptive.training.checkpoints.store import CheckpointStore, verify
from tests.helpers.disks import small_disk
from tests.helpers.ranks import run_ranks
from tests.helpers.waiting import PATIENCE, wait_until
from tests.training.setups import VIT, config, train_here

MIB = 2**20


class Warnings(list):
    def __call__(self, text: str, failed: int) -> None:
        self.append((text, failed))


def save(saver: Saver, step: int, size: int = 3) -> None:
    saver.save(step, {"weights": {"a": torch.full((size,), float(step))}}, {"step": step}, None, 0, 1)


class SlowStore(CheckpointStore):
    """Begins to write when told so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.go = threading.Event()

    def save(self, *snapshot):
        assert self.go.wait(PATIENCE)
        return super().save(*snapshot)


def test_one_save_is_under_way_and_the_next_waits_for_it(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    saver = Saver(store, CheckpointConfig(keep=1), Warnings())
    save(saver, 1)
    assert saver.busy
    assert store.all() == []
    threading.Timer(0.3, store.go.set).start()
    save(saver, 2)
    assert [c.step for c in store.all()][:1] == [1]
    saver.wait()
    assert not saver.busy
    assert [c.step for c in store.all()] == [2]
    saver.wait()
    saver.close()


def test_closing_waits_and_synchronous_saving_returns_when_it_is_there(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    saver = Saver(store, CheckpointConfig(), Warnings())
    save(saver, 1)
    threading.Timer(0.3, store.go.set).start()
    saver.close()
    assert [c.step for c in store.all()] == [1]
    saver = Saver(store, CheckpointConfig(asynchronous=False), Warnings())
    save(saver, 2)
    assert [c.step for c in store.all()] == [1, 2]


def test_failures_are_told_and_counted_and_end_the_run(tmp_path: Path) -> None:
    folder, warnings = tmp_path / "run" / "checkpoints", Warnings()
    folder.parent.mkdir()
    store = CheckpointStore(folder)
    saver = Saver(store, CheckpointConfig(max_failed=2), warnings)
    save(saver, 1)
    saver.wait()
    shutil.move(folder.parent, tmp_path / "gone")
    save(saver, 2)
    wait_until(lambda: not saver.busy)
    saver.poll()
    assert saver.failed == 1
    assert re.search(r"step-00000002 cannot be written: No such file or directory; .*: 1,", warnings[0][0])
    assert not folder.parent.exists(), "a folder that has gone (an unmounted disk, say) is not made anew"
    shutil.move(tmp_path / "gone", folder.parent)
    save(saver, 3)
    saver.wait()
    assert (saver.failed, [c.step for c in store.all()]) == (0, [1, 3])
    shutil.move(folder.parent, tmp_path / "gone")
    save(saver, 4)
    save(saver, 5)
    with pytest.raises(MachineError, match=r"checkpoint\.max_failed = 2 is reached"):
        save(saver, 6)
    assert [failed for _, failed in warnings] == [1, 1, 2]


def test_a_last_save_that_fails_ends_the_run_and_names_the_newest_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    saver = Saver(store, CheckpointConfig(max_failed=9), Warnings())
    save(saver, 1)
    saver.finish()
    (tmp_path / "checkpoints" / ".writing-00000002").touch()  # a file where a folder has to be
    save(saver, 2)
    with pytest.raises(MachineError, match=r"last checkpoint of the run.*newest good checkpoint is .*step-00000001"):
        saver.finish()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path) -> None:
    saver = Saver(CheckpointStore(tmp_path), CheckpointConfig(), Warnings())
    saver.save(1, {"weights": {"a": "no tensor"}}, {}, None, 0, 1)  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        saver.wait()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A run's checkpoints on a file system of 24 MiB."""
    with small_disk(tmp_path / "run" / "checkpoints", 24) as folder:
        yield folder


def test_a_full_and_a_read_only_disk_harm_nothing(disk: Path) -> None:
    warnings = Warnings()
    store = CheckpointStore(disk)
    saver = Saver(store, CheckpointConfig(keep=5, max_failed=9), warnings)
    for step in range(1, 6):
        save(saver, step, 8 * MIB // 4)  # three fit if nothing is written, two beside one that is
    saver.wait()
    assert [c.step for c in store.all()] == [1, 2]
    assert all(verify(c.path) is None for c in store.all())
    assert not list(disk.glob(".*")), "what was half written still takes up space"
    assert [failed for _, failed in warnings] == [1, 2, 3]
    assert "No space left on device" in warnings[0][0]
    shutil.rmtree(disk / "step-00000001")
    save(saver, 6, 8 * MIB // 4)
    saver.wait()
    assert [c.step for c in store.all()] == [2, 6]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    save(saver, 7)
    saver.wait()
    assert "Read-only file system" in warnings[-1][0]
    assert [c.step for c in store.all() if verify(c.path) is None] == [2, 6]


def _full_disk(data: str, folder: str, free_again: bool) -> str | None:
    """A run whose disk fills up after step 3; it is freed after step 5, or it stays full."""
    from adaptive.training.trainer import Callback, Trainer

    filler = Path(folder) / "checkpoints" / "filler"

    class Filler(Callback):
        def on_step(self, trainer) -> None:
            if trainer.rank:
                return
            trainer.saver._under_way and trainer.saver._under_way.exception()  # only the disk decides here
            if trainer.progress.step == 3:
                with filler.open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:
                        pass
            if trainer.progress.step == 5 and free_again:
                filler.unlink()

    original = Trainer.__init__

    def patched(self, *arguments, **keywords) -> None:
        original(self, *arguments, **keywords)
        self.callbacks.append(Filler())

    Trainer.__init__ = patched
    tree = config(
        data, folder, train={"max_steps": 9, "global_batch": 32}, checkpoint={"every_steps": 2, "keep": 9},
        tracking={"every_steps": 1, "gradient_norms": False}, model={"collaboration": False},
    )  # fmt: skip
    try:
        train_here(tree)
    except MachineError as error:
        return str(error)
    return None


@pytest.mark.ranks
def test_a_run_goes_on_through_a_full_disk_and_stops_when_it_stays_full(digits: Path, disk: Path) -> None:
    from adaptive.tracking.record import read

    run = disk.parent
    assert run_ranks(_full_disk, 1, str(digits), str(run), True) == [None]
    assert [c.step for c in CheckpointStore(disk).all()] == [2, 6, 8, 9]
    failures = [(r["step"], r["checkpoint/failed"]) for r in read(run / "metrics.jsonl") if "checkpoint/failed" in r]
    assert failures == [(5, 1)]

    for path in [*disk.iterdir(), run / "metrics.jsonl"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = run_ranks(_full_disk, 1, str(digits), str(run), False)[0]
    assert re.search(r"No space left on device.*max_failed = 2 is reached.*step-00000002", str(error)), error
    assert [c.step for c in CheckpointStore(disk).all()] == [2]


def _last_save_fails(data: str, folder: str) -> str:
    from adaptive.training.trainer import Trainer

    original = Trainer.save

    def patched(self, epoch_end_pending: bool = False) -> None:
        if self.at_end:
            shutil.rmtree(Path(folder) / "checkpoints" / "step-00000002")
            (Path(folder) / "checkpoints").rename(Path(folder) / "gone")
            (Path(folder) / "checkpoints").touch()  # the folder became a file
        original(self, epoch_end_pending)

    tree = config(data, folder, train={"max_steps": 3}, checkpoint={"every_steps": 1, "max_failed": 5})
    if os.environ["RANK"] == "0":
        Trainer.save = patched
    try:
        train_here(tree)
    except MachineError as error:
        return str(error)
    return "it ended well"


@pytest.mark.ranks
def test_all_ranks_end_alike_when_the_last_save_fails(digits: Path, tmp_path: Path) -> None:
    told = run_ranks(_last_save_fails, 2, str(digits), str(tmp_path / "run"))
    assert told[0] == told[1]
    assert "the last checkpoint of the run could not be saved" in told[0]


def _with_and_without_background(data: str, folder: str, stage: int) -> list[str]:
    """The same run saved while the loop waits, and by a slow writer beside it; returns the files that differ."""
    from adaptive.training.checkpoints.store import CheckpointStore as Store

    weights = Path(folder) / "weights.pth"  # a frozen teacher must have learned before
    original = Store.save
    for name in ("waits", "beside"):
        if name == "beside":

            def slow(self, *snapshot, **keywords):
                time.sleep(0.4)  # several steps: whatever still belonged to training would have changed
                return original(self, *snapshot, **keywords)

            Store.save = slow
        tree = config(
            data, Path(folder) / name, train={"max_steps": 9, "ema_decay": 0.5, "zero_stage": stage},
            model={"weights": str(weights)}, distillation={"gamma": 0.1, "teacher": "frozen"},
            checkpoint={"every_steps": 3, "keep": 9, "asynchronous": name == "beside"},
        )  # fmt: skip
        train_here(tree)
    Store.save = original
    files = sorted(p.relative_to(Path(folder) / "waits") for p in (Path(folder) / "waits").glob("checkpoints/*/*"))
    assert len(files) >= 3 * 6, files
    pairs = [(file, [(Path(folder) / name / file).read_bytes() for name in ("waits", "beside")]) for file in files]
    return [str(file) for file, (one, other) in pairs if one != other]


@pytest.mark.ranks
def test_a_snapshot_is_of_its_moment_while_training_goes_on(digits: Path, tmp_path: Path) -> None:
    for world, stage in ((1, 0), (2, 2)):
        folder = tmp_path / f"{world}-{stage}"
        folder.mkdir()
        torch.manual_seed(0)
        torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), folder / "weights.pth")
        assert run_ranks(_with_and_without_background, world, str(digits), str(folder), stage)[0] == []


def _saves(data: str, folder: str) -> list[tuple[int, bool]]:
    """An epoch of 6 steps and one of 6; saves every 3 steps and every 9 epochs."""
    from adaptive.training.checkpoints.store import CheckpointStore as Store

    tree = config(
        data, folder, train={"epochs": 3, "global_batch": 216, "max_steps": 15},
        checkpoint={"every_steps": 3, "every_epochs": 9, "keep": 99}, evaluate={"every_epochs": 9},
    )  # fmt: skip
    train_here(tree)
    saved = Store(Path(folder) / "checkpoints").all()
    assert [c.epoch for c in saved] == [1, 1, 2, 2, 3]
    return [(c.step, c.state()["closed"]) for c in saved]


@pytest.mark.full  # a rule that the schedule of saves has alone
@pytest.mark.ranks
def test_steps_that_fall_on_an_epoch_end_are_saved_too(digits: Path, tmp_path: Path) -> None:
    found = run_ranks(_saves, 1, str(digits), str(tmp_path / "run"))[0]
    assert found == [(step, True) for step in (3, 6, 9, 12, 15)]


def _steps(data: str, folder: str, stage: int, last: int) -> dict[int, float]:
    """Go on to step ``last``; momentum is large, so that losses would show it if it were lost."""
    from adaptive.tracking.record import read

    tree = config(
        data, folder, model=VIT, optimizer={"lr": 0.05, "momentum": 0.95},
        train={"zero_stage": stage, "max_steps": last, "ema_decay": 0.9, "global_batch": 64},
        checkpoint={"every_steps": 3, "keep": 9}, tracking={"every_steps": 1, "gradient_norms": False},
    )  # fmt: skip
    train_here(tree)
    return {r["step"]: r["train/loss"] for r in read(Path(folder) / "metrics.jsonl") if "train/loss" in r}


@pytest.mark.ranks
def test_a_checkpoint_loads_on_other_ranks_and_at_another_stage_with_its_optimizer(
    digits: Path, tmp_path: Path
) -> None:
    whole, fewer, more = (str(tmp_path / name) for name in ("whole", "fewer", "more"))
    losses = run_ranks(_steps, 1, str(digits), whole, 0, 6)[0]
    run_ranks(_steps, 2, str(digits), fewer, 3, 3)
    assert run_ranks(_steps, 1, str(digits), fewer, 0, 6)[0] == pytest.approx(losses, abs=1e-5)
    shutil.copytree(whole, more)
    shutil.rmtree(Path(more) / "checkpoints" / "step-00000006")
    assert run_ranks(_steps, 2, str(digits), more, 2, 6)[0] == pytest.approx(losses, abs=1e-5)
    states = [CheckpointStore(Path(run) / "checkpoints").all()[-1].tensors("optimizer") for run in (whole, fewer, more)]
    for name, state in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], state, rtol=1e-3, atol=1e-5)
