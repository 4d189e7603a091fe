"""Checks before a run: of its dataset, asked for once per node, and of its folder, which is for one run at a time."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive import locks
from adaptive.config.loading import dump_config
from adaptive.data.packing.pack import pack
from adaptive.data.reading.loading import LoaderOptions
from adaptive.data.reading.stream import EvaluationStream, TrainStream
from adaptive.distributed.ranks import Ranks
from adaptive.doctor.checks.network import free_port
from adaptive.errors import DataError, MachineError
from adaptive.files import aside_of
from adaptive.jobs.requeue import worth_another_try
from adaptive.networks.weights import initial_weights
from adaptive.training.preflight import check_dataset, check_run_folder, occupy
from adaptive.training.run import prepare
from adaptive.training.starting import settings
from adaptive.training.supervision.peers import host_name
from tests.helpers.commands import Forks
from tests.helpers.noflock import EACH, leave_lease, take_flock_away
from tests.helpers.ranks import rank_environment
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


class Asked:
    """Counts what the file system is asked about shards, by os.stat and what is built on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, plain = 0, os.stat

        def counting(path: Any, *arguments: Any, **named: Any) -> os.stat_result:
            self.count += str(path).endswith(".tar")
            return plain(path, *arguments, **named)

        monkeypatch.setattr(os, "stat", counting)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_the_first_rank_of_a_node_looks_for_the_shards(
    local_rank: int, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for log in (initial_weights.log, settings.LOGGER):  # other tests of this process listen to them
        monkeypatch.setattr(log, "setLevel", lambda level: None)
    ranks, tree = Ranks(local_rank, local_rank, 2, 2), config(digits, tmp_path / "run")
    asked = Asked(monkeypatch)
    prepared = prepare(tree, ranks)
    assert (asked.count > 0) == (local_rank == 0)
    if local_rank:
        assert not (tmp_path / "run").exists()  # nor does it ask what else is the same for the node
        loader = LoaderOptions(ranks.rank, ranks.world)
        TrainStream(prepared.index, tree.data, "train", loader, seed=0, global_batch=32, micro_batch=2)
        EvaluationStream(prepared.index, tree.data, "val", loader, batch=10)
        assert asked.count == 0


@pytest.mark.full
@pytest.mark.ranks
def test_a_shard_that_a_node_lacks_is_told_to_all_its_ranks(other_digits: Path, tmp_path: Path, forks: Forks) -> None:
    (other_digits / "train-00001.tar").unlink()
    file, port = tmp_path / "run.yaml", free_port()
    file.write_text(dump_config(config(other_digits, tmp_path / "run").model_dump()), encoding="utf-8")
    ranks = [forks.start(["train", str(file)], environment=rank_environment(rank, 2, port)) for rank in range(2)]
    ended = [rank.wait(60) for rank in ranks]
    assert [one.code for one in ended] == [1, 1]
    for one in ended:
        assert "train shards: train-00001.tar; copy them or pack again" in one.err
    assert f"rank 0 on {host_name()} cannot start: " in ended[1].err
