"""The cache of shards: bounded, shared, whole or not there."""

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from adaptive import locks
from adaptive.config.sections import DataConfig
from adaptive.data.faults import BadDataError
from adaptive.data.packing.pack import pack
from adaptive.data.remote.transfer import Cancelled
from adaptive.data.shards import cache
from adaptive.data.shards.cache import ShardCache, cache_folder, check_cache, shard_files
from adaptive.data.shards.index import load_index
from adaptive.errors import ConfigError, DataError, MachineError
from tests.helpers.noflock import EACH, leave_lease, take_flock_away
from tests.helpers.shard_server import Faulty, serve
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.usefixtures("short_pauses")

MIB = 2**20


@pytest.fixture
def index(digits):
    return load_index(digits)


@pytest.fixture
def make(server, index, tmp_path):
    def cached(room=100 * MIB, **changes) -> ShardCache:
        data = DataConfig(path=server.url, cache=str(tmp_path / "cache"), cache_gib=room / 2**30, **changes)
        return shard_files(server.url, index, data)

    return cached


def kept(cached):
    return sorted(path.name for path in cached.folder.glob("*.tar"))


def test_shards_stay_and_are_those_of_the_server(make, index, digits, server):
    cached = make()
    for shard in index.split("train").shards:
        descriptor = cached.open(shard)
        assert os.read(descriptor, shard.bytes + 1) == (digits / shard.name).read_bytes()
        os.close(descriptor)
    assert cached.downloads == len(index.split("train").shards)
    assert cached.folder.name == index.fingerprint[:32]
    again = make()
    for shard in index.split("train").shards:
        os.close(again.open(shard))
    assert again.downloads == 0
    assert set(server.gets().values()) == {1}


def test_the_least_recently_used_makes_room(make, index):
    shards = index.split("train").shards
    room = sum(shard.bytes for shard in shards[:3]) + shards[3].bytes // 2
    cached = make(room)
    for age, shard in enumerate(shards[:3]):
        path = cached.fetch(shard)
        os.utime(path, (1000 + age, 1000 + age))
    cached.fetch(shards[0])  # used again
    cached.fetch(shards[3])
    assert kept(cached) == sorted(shards[n].name for n in (0, 2, 3))
    assert sum(path.stat().st_size for path in cached.folder.glob("*.tar")) <= room


def test_the_bound_counts_all_datasets_but_nothing_else(make, index, tmp_path):
    cached = make(index.split("train").shards[0].bytes + 1000)
    root = tmp_path / "cache"
    foreign = [root / "train-00000.tar", root / "digits" / "train-00000.tar", root / ("a" * 32) / "train-00000.tar"]
    other = root / ("b" * 32)
    for path in [*foreign, other / "train-00000.tar"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 1000)
    (other / "CACHEDIR.TAG").touch()
    (other / "locks").mkdir()
    cached.fetch(index.split("train").shards[0])
    assert (other / "train-00000.tar").exists()
    cached.fetch(index.split("train").shards[1])
    assert all(path.exists() for path in foreign)  # a user's own files, whatever data.cache is
    assert not (other / "train-00000.tar").exists()


def test_what_is_removed_while_open_can_be_read_on(make, index, digits):
    first, second = index.split("train").shards[:2]
    cached = make(max(first.bytes, second.bytes) + 1000)
    descriptor = cached.open(first)
    cached.fetch(second)
    assert kept(cached) == [second.name]
    assert os.pread(descriptor, first.bytes, 0) == (digits / first.name).read_bytes()
    os.close(descriptor)


def _download(cached, shard):
    cached.fetch(shard)


def test_killed_downloads_leave_nothing(make, index, server):
    shard = index.split("train").shards[0]
    server.faults = {shard.name: Faulty("stall", 1)}
    cached = make()
    process = multiprocessing.get_context("fork").Process(target=_download, args=(cached, shard))
    process.start()
    # The file is there once before the download begins, and again when the server has answered.
    wait_until(lambda: server.gets() and list(cached.folder.glob(".*.part")))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(cached.folder.glob(".*.part"))) == 1
    began = time.monotonic()
    cached.fetch(index.split("train").shards[1])  # looks for room, and finds it
    assert list(cached.folder.glob(".*.part")) == []
    cached.fetch(shard)  # the lock has died with its process
    assert time.monotonic() - began < 30


def test_who_comes_second_waits_and_who_need_not_wait_goes_on(make, index, server):
    server.hold = threading.Event()
    shard = index.split("train").shards[0]
    cached, other = make(), make()
    threads = [threading.Thread(target=cached.fetch, args=(shard,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(server.gets)
    other.fetch(shard, wait=False)
    assert kept(cached) == []
    server.hold.set()
    for thread in threads:
        thread.join()
    assert server.gets() == {shard.name: 1}


def test_a_download_that_nobody_wants_any_more_ends(make, index, server):
    shard = index.split("train").shards[0]
    server.faults = {shard.name: Faulty("stall")}
    cached, cancel = make(), threading.Event()
    threading.Timer(0.3, cancel.set).start()
    began = time.monotonic()
    with pytest.raises(Cancelled):
        cached.fetch(shard, cancel=cancel)
    assert time.monotonic() - began < 30
    assert list(cached.folder.glob(".*.part")) == []


def test_a_damaged_file_is_fetched_again(make, index, server):
    shard = index.split("train").shards[0]
    cached = make()
    path = cached.fetch(shard)
    path.write_bytes(b"short")
    assert cached.fetch(shard).stat().st_size == shard.bytes
    assert server.gets() == {shard.name: 2}


def test_too_small_is_refused_with_numbers(index, server):
    def settings(shards, window=2):
        sizes = sorted(shard.bytes for shard in index.split("train").shards)
        return DataConfig(path=server.url, cache_gib=shards * sizes[-1] / 2**30, shuffle_window=window)

    assert check_cache(index, "train", settings(2.5)) == 2
    with pytest.raises(
        ConfigError, match=r"data\.cache_gib = \S+ holds 1 shards of split train .*window = 2 reads 2 at"
    ):
        check_cache(index, "train", settings(1.5))
    with pytest.raises(ConfigError, match=r"holds 0 shards .*set data\.cache_gib to \S+ or more"):
        check_cache(index, "train", settings(0.5))
    assert check_cache(index, "val", settings(1.5)) >= 1  # a split of one shard needs one


def test_a_full_disk_is_named(make, index, monkeypatch):
    shard = index.split("train").shards[0]
    cached = make()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100 * MIB, 100 * MIB, 1000))
    with pytest.raises(
        MachineError, match=r"no space left in data\.cache = .*train-00000\.tar has 0\.\d MiB, 0\.0 MiB"
    ):
        cached.fetch(shard)
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "file_sha256", full)
    with pytest.raises(MachineError, match=r"no space left here for .*train-00000\.tar; free some"):
        cached.fetch(shard)
    assert list(cached.folder.glob(".*.part")) == []


def test_where_it_lies(monkeypatch, tmp_path, make, index):
    data = DataConfig(path="http://h/d")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(data) == tmp_path / "adaptive" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(data) == Path.home() / ".cache" / "adaptive" / "shards"
    (tmp_path / "cache").touch()
    with pytest.raises(MachineError, match=r"data\.cache = '.*' cannot be used: .*give another folder"):
        make().fetch(index.split("train").shards[0])


def test_failures_are_not_tried_by_every_thread_anew(make, index, server):
    shard = index.split("train").shards[0]
    server.faults = {shard.name: Faulty("wrong")}
    cached = make(attempts=2)
    for _ in range(2):
        with pytest.raises(DataError, match="is not what was packed"):
            cached.fetch(shard)
    assert server.gets()[shard.name] == 2


@pytest.fixture
def short_leases(monkeypatch):
    monkeypatch.setattr(locks, "LEASE", 1.0)
    monkeypatch.setattr(locks, "BEAT", 0.2)


@pytest.mark.parametrize("number", EACH)
@pytest.mark.usefixtures("short_leases")
def test_without_flock_it_is_shared_all_the_same(number, make, index, server, monkeypatch):
    take_flock_away(monkeypatch, number)
    shard = index.split("train").shards[0]
    caches = [make() for _ in range(4)]
    threads = [threading.Thread(target=cached.fetch, args=(shard,)) for cached in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.gets() == {shard.name: 1}
    assert not list(caches[0].root.rglob("*.lease"))


@pytest.mark.usefixtures("short_leases")
def test_without_flock_the_downloads_of_a_machine_that_has_gone_make_room(make, index, monkeypatch):
    """They were waited for: who asks once does not see a lock's silence."""
    take_flock_away(monkeypatch, errno.ENOLCK)
    first, second = index.split("train").shards[:2]
    cached = make(max(first.bytes, second.bytes) + 1000)
    cached._prepare()
    part = cached.folder / f".{first.name}.{first.bytes}.17-0.part"
    part.touch()
    leave_lease(cached.folder / "locks" / f"{first.name}.lock", monkeypatch)
    assert cached.fetch(second).stat().st_size == second.bytes
    assert not part.exists()


def test_a_kill_never_leaves_a_tag_half_written(make, index, monkeypatch):
    """Others take its existence for a folder that is ready."""
    cached = make()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cached._prepare()
    assert not (cached.folder / "CACHEDIR.TAG").exists()


def test_a_dataset_that_is_replaced_at_its_url_is_noticed(digits, tmp_path):
    folder = tmp_path / "served"
    shutil.copytree(digits, folder)
    with serve(folder) as server:
        index = load_index(server.url)
        data = DataConfig(path=server.url, cache=str(tmp_path / "cache"), attempts=1)
        cached = shard_files(server.url, index, data)
        first, *_, last = index.split("train").shards
        cached.fetch(first)
        shutil.rmtree(folder)
        pack("builtin:digits", folder, seed=1, shard_count=300, workers=1, progress=False)
        for shard in (last, replace_name(last)):  # other bytes, and gone
            with pytest.raises(DataError, match="was replaced by another dataset while it was read") as noticed:
                cached.fetch(shard)
            assert not isinstance(noticed.value, BadDataError)


def replace_name(shard):
    return shard.model_copy(update={"name": "train-00099.tar"})
