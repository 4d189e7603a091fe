"""Checks before a run: of its dataset, and of its folder, which is for one run at a time."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from adaptive import locks
from adaptive.data.packing.pack import pack
from adaptive.errors import DataError, MachineError
from adaptive.files import aside_of
from adaptive.jobs.requeue import worth_another_try
from adaptive.training.preflight import check_dataset, check_run_folder, occupy
from tests.helpers.noflock import EACH, leave_lease, take_flock_away
from tests.training.setups import config


def test_a_dataset_of_one_class_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / "images" / split / "cat").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(tmp_path / "images" / split / "cat" / f"{i}.png")
    pack(str(tmp_path / "images"), tmp_path / "packed", workers=1, progress=False)
    with pytest.raises(DataError, match=r"data\.path = .*packed' has 1 class.*two classes or more"):
        check_dataset(config(tmp_path / "packed", train={"global_batch": 2}))


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "BEAT", 0.2)


@pytest.mark.parametrize("number", EACH)
@pytest.mark.usefixtures("short_leases")
def test_without_flock_a_run_folder_is_for_one_all_the_same(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_flock_away(monkeypatch, number)
    leave_lease(tmp_path / ".lock", monkeypatch)  # of a machine that has gone
    with (
        occupy(tmp_path, patience=0.5),
        pytest.raises(MachineError, match=rf"is in use: process {os.getpid()} on .* trains in it; end that run"),
    ):
        occupy(tmp_path, patience=0.5)
    occupy(tmp_path, patience=0.5).release()


@pytest.mark.usefixtures("short_leases")
def test_a_lock_without_signs_of_life_is_named_and_the_job_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_flock_away(monkeypatch, errno.ENOSYS)
    (tmp_path / ".lock.lease").write_text("17\nnode7\n")  # shows none: not of this version
    with pytest.raises(MachineError) as refused:
        occupy(tmp_path, patience=0.5)
    assert str(refused.value).endswith(
        f"is locked by another process, which gives no sign of life; if it has gone, remove its lock: rm "
        f"{tmp_path}/.lock.lease"
    )
    assert worth_another_try(refused.value.exit_code)


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(MachineError, match=r"train\.run_folder = .* cannot be locked: .*\.lock: Is a directory; "):
        occupy(tmp_path)


def test_many_processes_of_one_number_may_look_whether_a_folder_can_be_written(tmp_path: Path) -> None:
    """In containers every rank may be process 1."""
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(check_run_folder, [tmp_path] * 400):
            pass
    assert list(tmp_path.iterdir()) == []


def test_what_was_half_written_by_a_killed_process_goes_with_the_next_start(tmp_path: Path) -> None:
    old, young = aside_of(tmp_path / "config.yaml"), aside_of(tmp_path / "config.yaml")
    for path in (old, young, tmp_path / "config.yaml"):
        path.touch()
        os.utime(path, (0, 0))
    os.utime(young)  # an evaluation may be writing it
    occupy(tmp_path).release()
    assert not old.exists()
    assert young.exists()
    assert (tmp_path / "config.yaml").exists()
