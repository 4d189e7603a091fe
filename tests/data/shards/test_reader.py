import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from adaptive.data.packing.pack import pack
from adaptive.data.reading.samples import SampleReader
from adaptive.data.shards import reader as reader_module
from adaptive.data.shards.cache import shard_files
from adaptive.data.shards.index import load_index
from adaptive.data.shards.reader import LocalFiles, ShardReader, split_name
from adaptive.errors import DataError


@pytest.fixture
def reader(digits, monkeypatch):
    monkeypatch.setattr(reader_module, "_FIRST_PAUSE", 0.001)
    found = ShardReader(LocalFiles(digits), load_index(digits).split("train").shards, capacity=2)
    yield found
    found.close()


def test_few_files_stay_open(reader):
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for position in range(3):
        for shard in range(4):
            assert reader.read(shard, position).key.startswith("train-")
            assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2
    assert reader.done.opens == 12
    for _ in range(5):
        reader.read(3, 0)
    assert reader.done.opens == 12


def test_passing_failures_are_retried_and_lasting_ones_reported(reader, monkeypatch):
    expected = reader.read(0, 7)
    failures = iter([errno.EIO, errno.ESTALE])
    pread = os.pread

    def flaky(*arguments):
        if number := next(failures, 0):
            raise OSError(number, os.strerror(number))
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", flaky)
    assert reader.read(0, 7) == expected

    def broken(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(DataError, match=r"train-00000\.tar cannot be read: Input/output error"):
        reader.read(0, 7)


def test_what_was_read_is_counted_and_goes_forward_within_a_batch(digits):
    info = load_index(digits).split("train")
    reader = ShardReader(LocalFiles(digits), info.shards, capacity=8)
    samples = SampleReader(reader, info, 10, replace=True, max_bad=0)
    generator = np.random.default_rng(0)
    for _ in range(3):
        ids = generator.choice(info.count, 64, replace=False)
        assert [one.id for one in samples.read(ids)] == ids.tolist()
    done, opened = reader.done, len(info.shards)
    assert done.opens == opened
    assert done.reads == done.forward + done.backward == 2 * 3 * 64  # image and label
    assert done.backward <= 2 * opened  # back to the beginning of a shard once a batch
    assert done.bytes > 3 * 64 * 50
    reader.close()


def test_shards_are_read_ahead(digits, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: asked.append(words[1:]))
    reader = ShardReader(LocalFiles(digits), load_index(digits).split("train").shards, capacity=2)
    reader.read(0, 0)
    reader.read(0, 1)
    assert asked == [(0, 0, os.POSIX_FADV_WILLNEED)]
    monkeypatch.delattr(os, "posix_fadvise")
    assert reader.read(1, 0).key.startswith("train-")
    reader.close()


@given(st.text(st.sampled_from("a./_é \n\0\\"), max_size=12) | st.text(max_size=12))
@example("folder.d/key.seg.png")
@example("./.hidden")
@example("a/.png")
def test_names_are_split_as_webdataset_splits_them(name):
    assert split_name(name) == base_plus_ext(name)


def opened(folder, index):
    """A reader of the dataset that has opened its first shard."""
    files = shard_files(folder, index)
    reader = SampleReader(ShardReader(files, index.split("train").shards, 1), index.split("train"), 10, False, 10**6)
    assert reader.read(np.array([0]))[0].raw.label is not None
    return reader


@pytest.mark.parametrize("sizes", ["others", "the same"])
def test_a_dataset_that_is_replaced_while_it_is_read_is_noticed(digits, tmp_path, sizes):
    """Whatever data.max_bad allows: its samples are not bad, but others."""
    folder = tmp_path / "packed"
    shutil.copytree(digits, folder)
    index = load_index(folder)
    reader = opened(folder, index)
    shutil.rmtree(folder)
    pack("builtin:digits", folder, shard_count=300 if sizes == "the same" else 200, seed=1, workers=1, progress=False)
    if sizes == "the same":
        assert [s.count for s in load_index(folder).split("train").shards] == index.split("train").counts
    with pytest.raises(DataError, match=r"packed was replaced by another dataset while it was read \(fingerprint "):
        reader.read(np.array([index.split("train").count - 1]))


def test_a_shard_that_has_gone_with_its_dataset_is_told_so_too(digits, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(digits, folder)
    index = load_index(folder)
    reader = opened(folder, index)
    shutil.rmtree(folder)
    pack("builtin:digits", folder, seed=1, workers=1, progress=False)
    assert not (folder / index.split("train").shards[-1].name).exists()
    with pytest.raises(DataError, match="packed was replaced by another dataset while it was read"):
        reader.read(np.array([index.split("train").count - 1]))


def test_the_same_dataset_packed_again_is_read_on(digits, tmp_path):
    folder = tmp_path / "packed"
    shutil.copytree(digits, folder)
    index = load_index(folder)
    reader = opened(folder, index)
    shutil.rmtree(folder)
    shutil.copytree(digits, folder)
    assert reader.read(np.array([index.split("train").count - 1]))[0].raw.label is not None


def test_a_shard_that_grew_is_not_read(digits, tmp_path):
    """Its offsets are no longer those of the shard that was packed."""
    folder = tmp_path / "packed"
    shutil.copytree(digits, folder)
    index = load_index(folder)
    with (folder / index.split("train").shards[0].name).open("ab") as file:
        file.write(bytes(10240))
    reader = ShardReader(shard_files(folder, index), index.split("train").shards, 1)
    with pytest.raises(DataError, match=r"has \d+ bytes, the index says \d+"):
        reader.read(0, 0)
