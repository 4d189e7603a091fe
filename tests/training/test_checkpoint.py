import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from adaptive.errors import CheckpointError
from adaptive.training.checkpoint import CheckpointStore, newest_or_refuse, verify


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
        from adaptive.training import checkpoint as module
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


def test_no_space_is_said_and_harms_nothing(tmp_path: Path) -> None:
    """A file size limit stands in for a full disk: the same OSError from the same write."""
    script = textwrap.dedent(
        """
        import resource, signal, sys, torch
        from adaptive.errors import MachineError
        from adaptive.training.checkpoint import CheckpointStore
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
