"""Locks of DeepSpeed's compilations: those of killed processes go, others stay."""

import logging
import os
import time

import pytest
from filelock import FileLock

from adaptive.training.engine import operators
from adaptive.training.engine.operators import free_operators, lock_state, operator_folder
from tests.helpers.noflock import EACH, take_flock_away


def locks(folder, monkeypatch):
    """What a compilation that was killed, one that is under way and one that has just begun leave to be seen."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    assert operator_folder() == folder
    made = {name: folder / f"deepspeed_{name}" / "lock" for name in ("killed", "compiling", "young")}
    for lock in made.values():
        lock.parent.mkdir()
        lock.touch()
    for name in ("killed", "compiling"):
        os.utime(made[name], (time.time() - 1000, time.time() - 1000))
    return made


def test_only_what_nobody_holds_and_is_old_is_removed(tmp_path, monkeypatch, caplog):
    """As torch before 2.15 locks: by the file's existence, which the compiling process holds open."""
    monkeypatch.setattr(operators, "_existence_locks", lambda: True)
    made = locks(tmp_path, monkeypatch)
    with made["compiling"].open("rb"), caplog.at_level(logging.WARNING):
        free_operators()
        assert [lock_state(made[name]) for name in ("killed", "compiling", "young")] == ["free", "held", "young"]
    assert [made[name].exists() for name in ("killed", "compiling", "young")] == [False, True, True]
    assert f"removed {made['killed']}" in caplog.text
    assert f"({made['compiling']}); waiting for it" in caplog.text
    assert f"if there is none (it was killed), remove {made['young']}" in caplog.text


def test_a_lock_that_ends_with_its_process_needs_nothing(tmp_path, monkeypatch, caplog):
    """As torch locks from 2.15 on; its files stay when a compilation is done."""
    monkeypatch.setattr(operators, "_existence_locks", lambda: False)
    made = locks(tmp_path, monkeypatch)
    with FileLock(made["compiling"]), caplog.at_level(logging.WARNING):
        free_operators()
    assert all(lock.exists() for lock in made.values())
    assert f"({made['compiling']}); waiting for it" in caplog.text
    assert len(caplog.records) == 1


def test_which_way_this_torch_locks_is_known():
    from torch.utils import cpp_extension

    assert operators._existence_locks() is not hasattr(cpp_extension, "FileLock")


def test_the_folder_is_torchs_own(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert operator_folder().is_relative_to(tmp_path)


@pytest.mark.parametrize("number", EACH)
def test_without_flock_what_a_kill_left_is_removed_too(tmp_path, monkeypatch, number):
    """It was taken for a compilation under way, which torch then waited for without end."""
    take_flock_away(monkeypatch, number)
    monkeypatch.setattr(operators, "_existence_locks", lambda: True)
    made = locks(tmp_path, monkeypatch)
    with made["compiling"].open("rb"):
        free_operators()
    assert [made[name].exists() for name in ("killed", "compiling", "young")] == [False, True, True]


def test_a_lock_that_another_start_has_made_meanwhile_stays(tmp_path, monkeypatch):
    """Two starts find what a kill left; one removes it and compiles, and the other must not remove the new lock."""
    monkeypatch.setattr(operators, "_existence_locks", lambda: True)
    lock = locks(tmp_path, monkeypatch)["killed"]
    judged = operators.lock_state

    def late(path):
        state = judged(path)
        if path == lock:  # the other start was quicker
            path.unlink()
            path.write_text("compiling")
        return state

    monkeypatch.setattr(operators, "lock_state", late)
    free_operators()
    assert lock.read_text() == "compiling"
    assert sorted(path.name for path in lock.parent.iterdir()) == ["lock"]
