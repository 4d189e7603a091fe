"""Shards on a node's own disk, before training."""

import errno
import os
import shutil
import sys

import pytest

from adaptive.data.shards.cache import ShardCache, shard_files
from adaptive.data.shards.index import load_index
from adaptive.errors import DataError, MachineError
from adaptive.jobs.stage import main, stage


@pytest.fixture
def index(digits):
    return load_index(digits)


def test_shards_of_a_folder_are_brought_to_the_nodes_own_disk(digits, index, tmp_path, monkeypatch):
    disk = tmp_path / "stage" / "here"
    monkeypatch.setenv("ADAPTIVE_STAGE", str(disk))
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "it's #1 100%25 {a,b}?"
    odd.symlink_to(digits)
    config = tmp_path / "run.yaml"
    config.write_text('model: {backbone: test_resnet}\ndata: {path: "it\'s #1 100%25 {a,b}?"}\n')
    shards = [*index.split("train").shards, *index.split("val").shards]
    assert f": {len(shards)} shards in {disk}, {len(shards)} of them brought now" in stage([str(config)])
    kept = sorted(disk.rglob("*.tar"))
    assert [path.read_bytes() for path in kept] == [(digits / path.name).read_bytes() for path in kept]
    assert len(kept) == len(shards)
    kept[0].unlink()
    kept[1].write_bytes(b"cut")
    assert f"{len(shards)} shards in {disk}, 2 of them brought now" in stage([str(config)])

    files = shard_files(odd, index)
    assert isinstance(files, ShardCache)
    os.close(files.open(shards[0]))
    assert files.downloads == 0


def test_what_does_not_fit_or_is_not_what_was_packed_is_refused(digits, index, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_STAGE", str(tmp_path / "stage"))
    config = tmp_path / "run.yaml"
    copy = shutil.copytree(digits, tmp_path / "copy")
    config.write_text(f"model: {{backbone: test_resnet}}\ndata: {{path: {copy}, attempts: 1}}\n")
    broken = copy / index.split("train").shards[0].name
    broken.write_bytes(bytes([broken.read_bytes()[0] ^ 1]) + broken.read_bytes()[1:])
    with pytest.raises(DataError, match=r"is not what was packed \(sha256"):
        stage([str(config)])
    monkeypatch.setattr("adaptive.jobs.stage.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(
        MachineError, match=r"ADAPTIVE_STAGE = .* has 0 MiB free, the shards need another \d+; free some"
    ):
        stage([str(config)])


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 71), (None, 1)])
def test_a_task_that_fails_leaves_its_own_code_since_srun_s_is_that_of_a_task_which_it_killed(
    number, code, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ADAPTIVE_RESULTS", str(tmp_path))
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setattr(sys, "argv", ["stage.py", "--", str(tmp_path / "none.yaml")])
    if number is not None:

        def fail(words):
            raise OSError(number, os.strerror(number), "shard-000000.tar")

        monkeypatch.setattr("adaptive.jobs.stage.stage", fail)
    assert main() == code
    assert (tmp_path / "rank-3").read_text() == f"{code}\n"
    assert capsys.readouterr().err.startswith("adaptive train: error: ")
