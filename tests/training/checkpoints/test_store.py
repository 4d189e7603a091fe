import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from adaptive.errors import CheckpointError
from adaptive.training.checkpoints.store import CheckpointStore, newest_or_refuse, verify
from tests.helpers.ranks import fork_context
from tests.helpers.waiting import PATIENCE, wait_until


def write(store: CheckpointStore, step: int, score: float | None = None) -> None:
    tensors = {"weights": {"a": torch.full((3,), float(step)), "b": torch.arange(step + 1)}}
    store.save(step, tensors, {"progress": {"step": step}}, score)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    shared = torch.arange(6.0).view(2, 3)
    store.save(4, {"weights": {"x": shared.t(), "y": shared[0]}}, {"n": [1, 2.5, None]}, 71.5)
    checkpoint = newest_or_refuse(store)
    assert (checkpoint.step, checkpoint.score) == (4, 71.5)
    assert checkpoint.state() == {"n": [1, 2.5, None]}
    tensors = checkpoint.tensors("weights")
    assert torch.equal(tensors["x"], shared.t())
    assert torch.equal(tensors["y"], shared[0])
    assert checkpoint.tensors("ema") == {}


def test_a_folder_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    """safetensors writes files below such a folder, and opens none of them."""
    store = CheckpointStore(tmp_path / "run\udce9")
    write(store, 1)
    assert newest_or_refuse(store).tensors("weights")["a"].tolist() == [1, 1, 1]
    (tmp_path / "run\udce9" / "step-00000001" / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"run\\udce9.* holds no tensors"):
        store.all()[0].tensors("weights")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / "manifest.json").unlink(), "no readable manifest"),
        (lambda p: (p / "manifest.json").write_text("{"), "no readable manifest"),
        (lambda p: (p / "state.json").unlink(), "state.json is missing"),
        (lambda p: (p / "weights.safetensors").write_bytes(b"short"), "has 5 bytes"),
        (lambda p: flip_a_bit(p / "weights.safetensors"), "does not match its checksum"),
    ],
)
def test_damage_is_seen_and_passed_over(tmp_path: Path, damage, reason: str) -> None:
    store = CheckpointStore(tmp_path)
    write(store, 1)
    write(store, 2)
    damage(tmp_path / "step-00000002")
    assert reason in str(verify(tmp_path / "step-00000002"))
    checkpoint, passed_over = store.newest_valid()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert len(passed_over) == 1
    assert reason in passed_over[0]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_nothing_valid_is_refused_with_the_reasons(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        newest_or_refuse(store)
    write(store, 3)
    (tmp_path / "step-00000003" / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000003: state\.json is missing"):
        newest_or_refuse(store)


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, score in enumerate([50.0, 80.0, 60.0, 70.0, None], start=1):
        write(store, step, score)
    (tmp_path / ".writing-00000009").mkdir()
    store.prune(keep=2)
    assert [c.step for c in store.all()] == [2, 4, 5]
    assert store.best().step == 2
    assert not list(tmp_path.glob(".*"))


def test_a_later_phase_is_better_whatever_the_earlier_one_scored(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step, (phase, score) in enumerate([(0, 90.0), (1, 70.0), (1, 80.0), (1, 75.0)], start=1):
        store.save(step, {"weights": {"a": torch.zeros(1)}}, {}, score, phase)
    assert store.best().step == 3
    store.prune(keep=1)
    assert [c.step for c in store.all()] == [3, 4]


def test_a_kill_in_the_middle_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    """The process dies by SIGKILL after the files are written and before they are published."""
    script = textwrap.dedent(
        """
        import os, signal, sys, torch
        from pathlib import Path
        from adaptive.training.checkpoints import store as module
        store = module.CheckpointStore(sys.argv[1])
        save = lambda step: store.save(step, {"weights": {"a": torch.zeros(4)}}, {}, None)
        save(1)
        Path.rename = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
        save(2)
        """
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == -9
    store = CheckpointStore(tmp_path)
    assert [c.step for c in store.all()] == [1]
    assert list(tmp_path.glob(".writing-*"))
    write(store, 3)
    store.prune(keep=5)
    assert [c.step for c in store.all()] == [1, 3]
    assert not list(tmp_path.glob(".*"))


def _save_without_end(folder: str) -> None:
    """What a run does that is killed and started again, as fast as it can; it notes what it knows to be saved."""
    torch.set_num_threads(1)
    store = CheckpointStore(folder)
    noted = Path(folder).with_name("noted")
    newest, _ = store.newest_valid()
    step = newest.step if newest else 0  # the same step once more: it makes way for itself
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:  # a test that fails does not kill it
        tensors = {name: {"a": torch.full((30_000,), float(step))} for name in ("weights", "optimizer", "ema")}
        store.save(step, tensors, {"step": step}, score=float(step % 3), epoch=step // 5 + 1)
        noted.write_text(str(step))
        store.prune(keep=2, keep_every=10, newest=step)
        step += random.random() < 0.7


def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path: Path) -> None:
    folder, noted = tmp_path / "checkpoints", tmp_path / "noted"
    moments = random.Random(0)
    known, interrupted = 0, 0
    for _ in range(20):
        count = noted.stat().st_mtime_ns if noted.exists() else 0
        process = fork_context().Process(target=_save_without_end, args=(str(folder),))
        process.start()
        wait_until(lambda count=count: noted.exists() and noted.stat().st_mtime_ns != count)
        assert not list(folder.glob(".*/left_over")), "leftovers of the last kill"
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        interrupted += bool(list(folder.glob(".*")))
        for unfinished in (*folder.glob(".writing-*"), *folder.glob(".removing-*")):
            (unfinished / "left_over").touch()  # the next may write or remove the same step, under the same name
        store = CheckpointStore(folder)
        newest, passed_over = store.newest_valid()
        assert passed_over == []
        assert known <= newest.step
        known = int(noted.read_text() or known)
        assert newest.step >= known
        assert newest.state() == {"step": newest.step}
        assert torch.equal(newest.tensors("ema")["a"], torch.full((30_000,), float(newest.step)))
        assert all(verify(checkpoint.path) is None for checkpoint in store.all())
        assert store.best().score == 2.0 or newest.step < 3
    assert interrupted >= 5, "the kills came at quiet moments"
    store = CheckpointStore(folder)
    write(store, known + 1)
    store.prune(keep=2, keep_every=10)
    assert not list(folder.glob(".*"))
    kept = {c.epoch for c in store.all()}
    over = range(10, known // 5 + 1, 10)  # every tenth epoch that is over
    assert kept.issuperset(over), "a kept one was lost"


def test_the_same_step_makes_way_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies between the two renames: the old one is found, and gets its name back at the next save."""
    store = CheckpointStore(tmp_path)
    store.save(5, {"weights": {"a": torch.zeros(2)}}, {"which": "old"}, 1.0)
    renamed = []
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if renamed:
            raise KeyboardInterrupt  # stands in for a kill: nothing cleans up
        renamed.append(path.name)
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        store.save(5, {"weights": {"a": torch.ones(2)}}, {"which": "new"}, 2.0)
    monkeypatch.undo()
    assert renamed == ["step-00000005"]
    found = newest_or_refuse(CheckpointStore(tmp_path))
    assert (found.step, found.state()) == (5, {"which": "old"})
    store.save(6, {"weights": {"a": torch.zeros(2)}}, {}, None)
    assert [c.path.name for c in store.all()] == ["step-00000005", "step-00000006"]
    assert not list(tmp_path.glob(".*"))
    store.save(5, {"weights": {"a": torch.ones(2)}}, {"which": "new"}, 2.0)
    assert store.all()[0].state() == {"which": "new"}
    assert not list(tmp_path.glob(".*"))


def test_the_last_of_every_nth_epoch_stays_for_ever(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in range(1, 19):  # three to an epoch
        store.save(step, {"weights": {"a": torch.zeros(1)}}, {}, None, epoch=(step - 1) // 3 + 1)
        store.prune(keep=1, keep_every=2, newest=step)
    assert [c.step for c in store.all()] == [6, 12, 18]


def test_a_run_goes_on_before_a_damaged_checkpoint_and_keeps_what_it_went_on_from(tmp_path: Path) -> None:
    """The damaged one counts for nothing, however new it is and however well it scored."""
    store = CheckpointStore(tmp_path)
    for step, score in ((10, 50.0), (20, 40.0), (30, 99.0)):
        write(store, step, score)
    flip_a_bit(tmp_path / "step-00000030" / "weights.safetensors")
    store = CheckpointStore(tmp_path)  # a new process, which knows nothing of them
    assert store.newest_valid()[0].step == 20
    write(store, 25)
    store.prune(keep=1, newest=25)
    assert [c.step for c in store.all()] == [10, 25]
    flip_a_bit(tmp_path / "step-00000010" / "weights.safetensors")
    store = CheckpointStore(tmp_path)
    write(store, 35, 30.0)
    store.prune(keep=1, newest=35)
    assert [c.step for c in store.all()] == [35]


def test_no_space_is_said_and_harms_nothing(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the same OSError from the same write."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from adaptive.errors import MachineError
        from adaptive.training.checkpoints.store import CheckpointStore
        store = CheckpointStore(sys.argv[1])
        store.save(1, {"weights": {"a": torch.zeros(4)}}, {}, None)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            store.save(2, {"weights": {"a": torch.zeros(1_000_000)}}, {}, None)
        except MachineError as error:
            print(error)
        """
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "step-00000002 cannot be written" in ended.stdout
    assert [c.step for c in CheckpointStore(tmp_path).all()] == [1]
    assert verify(tmp_path / "step-00000001") is None
    assert not list(tmp_path.glob(".*"))


def test_manifest_lists_every_file(tmp_path: Path) -> None:
    write(CheckpointStore(tmp_path), 7)
    folder = tmp_path / "step-00000007"
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted(listed) == sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
