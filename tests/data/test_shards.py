import errno
import os
from pathlib import Path

import pytest
from webdataset.tariterators import base_plus_ext

from adaptive.data import shards
from adaptive.data.index import load_index
from adaptive.data.shards import ShardReader
from adaptive.errors import DataError


@pytest.fixture
def reader(digits, monkeypatch):
    monkeypatch.setattr(shards, "_FIRST_PAUSE", 0.001)
    found = ShardReader(digits, load_index(digits).split("train").shards, base_plus_ext, capacity=2)
    yield found
    found.close()


def test_few_files_stay_open(reader):
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for position in range(3):
        for shard in range(4):
            assert reader.read(shard, position).key.startswith("train-")
            assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 2
    assert reader.opens == 12
    for _ in range(5):
        reader.read(3, 0)
    assert reader.opens == 12


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
