"""A run that is read while it trains: the checkpoint that was chosen is pruned or replaced, and chosen again."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import adaptive
from adaptive import runs
from adaptive.errors import CheckpointError
from adaptive.training.checkpoints import checkpoint_manifest, reading
from adaptive.training.checkpoints.inventory import take_inventory
from adaptive.training.checkpoints.store import Checkpoint, CheckpointStore


class Training:
    """The saves of a run that goes on: each replaces the checkpoint before, with all weights its step's number."""

    def __init__(self, folder: Path, average: bool = True) -> None:
        self.store = CheckpointStore(folder / "checkpoints")
        self.newest = self.store.all()[-1]
        self.average, self.state = average, self.newest.state()
        self.weights = self.newest.tensors("weights")

    def save(self, step: int | None = None) -> None:
        step = self.newest.step + 1 if step is None else step
        tensors = {name: torch.full_like(tensor, step) for name, tensor in self.weights.items()}
        kinds = {"weights": tensors} | ({"ema": tensors} if self.average else {})
        self.newest = self.store.save(step, kinds, self.state, score=100.0 + step)
        self.store.prune(1)


@pytest.fixture
def training(existing_run: Path, tmp_path: Path) -> Training:
    training = Training(Path(shutil.copytree(existing_run, tmp_path / "run")))
    training.save()
    return training


def of_one_step(trained: runs.TrainedRun) -> bool:
    values = {float(value) for tensor in trained.network.state_dict().values() for value in tensor.flatten()[:1]}
    return values == {float(trained.checkpoint.step)}


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_checkpoint_that_is_pruned_while_the_network_is_built_is_chosen_again(
    training: Training, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = runs.rebuild_network

    def slowly(*arguments: object) -> object:
        training.save()
        return build(*arguments)

    monkeypatch.setattr(runs, "rebuild_network", slowly)
    trained = adaptive.load(training.store.folder.parent, which)
    assert trained.checkpoint.step == training.newest.step
    assert trained.averaged
    assert of_one_step(trained)


@pytest.mark.parametrize("at", ["state", "tensors"])
def test_pruned_in_any_other_moment_it_is_chosen_again_too(
    training: Training, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of its files a moving average went unnoticed, and the plain weights were taken."""
    read = getattr(Checkpoint, at)

    def pruned(checkpoint: Checkpoint, *names: str) -> object:
        if checkpoint.step < 4:
            training.save()
        found = read(checkpoint, *names)
        if 4 <= checkpoint.step < 6:
            training.save()
        return found

    monkeypatch.setattr(Checkpoint, at, pruned)
    trained = adaptive.load(training.store.folder.parent)
    assert trained.checkpoint.step == training.newest.step
    assert trained.averaged
    assert of_one_step(trained)


def test_a_step_that_is_saved_anew_is_read_whole(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed saves a step once more: state and weights are of one save."""
    training.average = False
    read = Checkpoint.state
    changed = []

    def replaced(checkpoint: Checkpoint) -> dict:
        found = read(checkpoint)
        if not changed:
            changed.append(True)
            training.state = {**training.state, "dataset": "of the second save"}
            training.save(training.newest.step)
        return found

    monkeypatch.setattr(Checkpoint, "state", replaced)
    trained = adaptive.load(training.store.folder.parent)
    assert trained.dataset == "of the second save"
    assert not trained.averaged


def test_a_step_that_was_asked_for_by_its_number_is_named_when_it_goes(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = runs.rebuild_network
    monkeypatch.setattr(runs, "rebuild_network", lambda *a: (training.save(), build(*a))[1])
    step = training.newest.step
    with pytest.raises(
        CheckpointError, match=f"has no checkpoint '{step}'; use best, last, or one of the steps {step + 1}"
    ):
        adaptive.load(training.store.folder.parent, str(step))


def test_one_that_never_stays_ends_in_one_line(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_ATTEMPTS", 3)
    read = Checkpoint.tensors
    monkeypatch.setattr(Checkpoint, "tensors", lambda *a: (training.save(), read(*a))[1])
    with pytest.raises(CheckpointError, match=r"are removed faster than they can be read; raise checkpoint\.keep"):
        adaptive.load(training.store.folder.parent)


def test_a_damaged_file_is_no_reason_to_choose_again(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(CheckpointStore, "best", lambda store: (chosen.append(1), training.newest)[1])
    (training.newest.path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json: classes: "):
        adaptive.load(training.store.folder.parent)
    assert len(chosen) == 1


@pytest.fixture
def pruning(training: Training, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Checksums, which take long for large files, are of files that go meanwhile."""
    digest = checkpoint_manifest.file_sha256

    def late(path: Path) -> str:
        monkeypatch.setattr(checkpoint_manifest, "file_sha256", digest)
        training.save()
        return digest(path)

    return lambda: monkeypatch.setattr(checkpoint_manifest, "file_sha256", late)


def test_a_checkpoint_that_goes_while_it_is_verified_is_passed_over(
    training: Training, pruning: Callable[[], None]
) -> None:
    store = CheckpointStore(training.store.folder)
    for look in (store.newest_valid, store.best, lambda: take_inventory(store)):
        pruning()
        look()
    pruning()
    assert adaptive.load(store.folder.parent).checkpoint.step == training.newest.step


@pytest.mark.full
def test_under_saves_without_a_pause_every_load_succeeds(training: Training) -> None:
    stop = threading.Event()

    def save() -> None:
        while not stop.is_set():
            training.save()

    thread = threading.Thread(target=save)
    thread.start()
    try:
        loaded = [adaptive.load(training.store.folder.parent, which) for which in ("best", "last") * 6]
    finally:
        stop.set()
        thread.join()
    assert all(map(of_one_step, loaded))
