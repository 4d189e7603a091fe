"""Datasets at a URL: from real servers that fail as servers fail."""

import gc
import multiprocessing
import os
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from adaptive.config.sections import Config, DataConfig
from adaptive.data.reading.images_by_id import read_images
from adaptive.data.reading.stream import EvaluationStream, LoaderOptions, TrainStream
from adaptive.data.remote.urls import is_remote, open_remote
from adaptive.data.shards.index import check_shards, load_index
from adaptive.errors import ConfigError, DataError, MachineError
from tests.helpers.shard_server import Faulty, ShardServer
from tests.helpers.waiting import PATIENCE, wait_until

pytestmark = [
    pytest.mark.usefixtures("short_pauses"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture
def settings(server, tmp_path):
    def make(**changes):
        small = {"image_size": 8, "crop": "pad", "crop_padding": 1, "shuffle_window": 2, "attempts": 3, "timeout": 20.0}
        return DataConfig(**{"path": server.url, "cache": str(tmp_path / "cache"), **small, **changes})

    return make


def train(where, data, *, rank=0, world=1, workers=0, index=None):
    data, loader = at(where, data), LoaderOptions(rank, world, workers)
    index = index or load_index(where, data)
    return TrainStream(index, data, "train", loader, seed=5, global_batch=48, micro_batch=48 // world)


def evaluation(where, data, split="val", workers=0):
    loader = LoaderOptions(workers=workers)
    return EvaluationStream(load_index(where, data), at(where, data), split, loader, batch=32)


def at(where, data):
    return data.model_copy(update={"path": str(where)})


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_url_gives_the_same_batches_as_the_folder(digits, server, settings, workers):
    data = settings()
    expected = list(train(digits, data).batches(20, 30))
    found = list(train(server.url, data, workers=workers).batches(20, 30))
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    passes = list(evaluation(server.url, data, workers=workers))
    assert all(same(a, b) for a, b in zip(evaluation(digits, data), passes, strict=True))
    index = load_index(server.url, data)
    assert index == load_index(digits)
    images = read_images(server.url, index, "val", [3, 1], data)
    assert [i.tobytes() for i in images] == [i.tobytes() for i in read_images(digits, index, "val", [3, 1])]


def _one_rank(url, data, rank, steps, index):
    torch.set_num_threads(1)
    stream = train(url, data, rank=rank, world=2, workers=2, index=index)
    ids = torch.cat([batch.ids for batch in stream.batches(0, steps)])
    assert len(ids) == 24 * steps


@pytest.mark.ranks
def test_every_shard_is_fetched_once_per_machine(server, settings):
    """Two ranks of two workers over more than two epochs share the cache: whole shards, one request each."""
    data = settings()
    index = load_index(server.url, data)
    server.requests.clear()
    server.sent.clear()
    server.slow = 0.05  # a real server is not instantaneous: whoever comes second must wait for the first
    context = multiprocessing.get_context("fork")
    steps = 2 * (index.split("train").count // 48) + 5
    ranks = [context.Process(target=_one_rank, args=(server.url, data, r, steps, index)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
    assert [process.exitcode for process in ranks] == [0, 0]
    shards = [shard.name for shard in index.split("train").shards]
    assert len(shards) > 3
    assert server.gets() == dict.fromkeys(shards, 1)
    assert {asked for _, _, asked in server.requests} == {None}  # no ranges: whole and in sequence
    assert sorted(server.sent) == sorted(shards)
    assert [path.name for path in Path(data.cache).rglob("*.part")] == []


def test_coming_shards_are_fetched_in_the_order_of_the_plan_and_no_further(server, settings):
    data = settings(shuffle_window=1, cache_ahead=1)
    stream = train(server.url, data)
    server.requests.clear()
    batches = stream.batches(0, 20)
    next(batches)
    wait_until(lambda: len(server.requests) >= 2)
    time.sleep(0.5)  # for what must not come
    order = [stream._schedule.shard(place) for place in range(5)]
    names = [stream._shards.info.shards[shard].name for shard in order]
    # The one that is read and the one after it, which two threads ask for at the same time.
    assert {name for _, name, _ in server.requests} == set(names[:2])
    assert len(server.requests) == 2
    for _ in range(10):
        next(batches)
    wait_until(lambda: len(server.requests) >= 3)
    assert [name for _, name, _ in server.requests][2:] == names[2 : len(server.requests)]
    batches.close()
    assert "shard-prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("how", ["503", "429", "drop", "cut", "wrong", "stall"])
def test_what_passes_is_tried_again(digits, server, settings, how):
    data = settings(timeout=1.5 if how == "stall" else 20.0, cache_ahead=0)
    name = load_index(server.url, data).split("val").shards[0].name
    server.faults = {name: Faulty(how, 2), "index.json": Faulty("503", 1)}
    found = list(evaluation(server.url, data))
    assert all(same(a, b) for a, b in zip(evaluation(digits, data), found, strict=True))
    assert server.gets()[name] == 3


@pytest.mark.parametrize(
    ("how", "requests", "reason"),
    [
        ("503", 3, r"HTTP 503 .*3 attempts in \d+ s\); check the server .* data\.timeout = 20 or data\.attempts"),
        ("cut", 3, r"cannot be read \(.*3 attempts"),
        ("stall", 3, r"cannot be read \(.*3 attempts.*data\.timeout = 1\.5"),
        ("wrong", 3, r"is not what was packed \(sha256 .*, the index says .*3 attempts\D.*copy it there again"),
        ("long", 3, r"is not what was packed \(more than \d+ bytes"),
        ("403", 1, r"HTTP 403 .*1 attempt in \d+ s\); check the URL and your right to read it"),
        ("404", 1, r"does not exist; check data\.path"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_lasts_is_one_line(server, settings, how, requests, reason, workers):
    data = settings(timeout=1.5 if how == "stall" else 20.0, cache_ahead=0)
    name = load_index(server.url, data).split("val").shards[0].name
    stream = evaluation(server.url, data, workers=workers)
    server.faults = {name: Faulty(how)}
    with pytest.raises(DataError, match=rf"{server.url}/{name} {reason}|{server.url}/{name} .*{reason}") as caught:
        list(stream)
    assert "\n" not in str(caught.value)
    assert server.gets()[name] == requests
    assert [path.name for path in Path(data.cache).rglob("*.part")] == []


def test_a_server_that_is_not_there(settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/data"
    with pytest.raises(DataError, match=rf"{url}/index.json cannot be read \(Cannot connect .*3 attempts"):
        load_index(url, settings(path=url))


def test_passwords_are_not_shown(settings, server):
    host = server.url.partition("://")[2]
    url = f"http://anna:hush@{host}/nothing?token=secret"
    with pytest.raises(DataError) as caught:
        load_index(url, settings(path=url))
    assert "does not exist" in str(caught.value)
    assert not {"hush", "secret", "anna"} & set(str(caught.value).replace("=", " ").replace("@", " ").split())
    server.faults = {"index.json": Faulty("403")}
    url = f"http://anna:hush@{host}?token=secret"
    with pytest.raises(DataError, match="HTTP 403") as caught:
        load_index(url, settings(path=url))
    assert "hush" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_sizes_are_checked_at_once_before_anything_starts(server, settings, monkeypatch):
    data = settings()
    index = load_index(server.url, data)
    server.requests.clear()
    check_shards(index, server.url, "train", settings=data)
    assert sorted(name for method, name, _ in server.requests if method == "HEAD") == sorted(
        shard.name for shard in index.split("train").shards
    )
    assert server.gets() == {}
    server.requests.clear()
    train(server.url, data, index=index)
    assert server.requests == []  # the streams of all ranks rely on it
    server.faults = {"train-00001.tar": Faulty("404")}
    with pytest.raises(DataError, match=rf"{server.url} lacks 1 of \d+ train shards: train-00001\.tar; copy"):
        check_shards(index, server.url, "train", settings=data)
    server.faults = {"train-00001.tar": Faulty("long")}
    with pytest.raises(DataError, match=r"train-00001\.tar has \d+ bytes, the index says \d+"):
        check_shards(index, server.url, "train", settings=data)
    server.faults = {"train-00001.tar": Faulty("unknown")}  # HEAD says 0 bytes, GET gives them
    check_shards(index, server.url, "train", settings=data)
    assert load_index(server.url, data) == index
    server.faults = {"train-00001.tar": Faulty("503")}
    with pytest.raises(DataError, match="HTTP 503"):
        check_shards(index, server.url, "train", settings=data)


def test_only_the_first_rank_asks(server, settings):
    from adaptive.training.preflight import check_dataset

    config = Config.model_validate({"model": {"backbone": "test_resnet"}, "data": settings().model_dump()})
    check_dataset(config, rank=1)
    assert [(method, name) for method, name, _ in server.requests] == [("GET", "index.json")]
    check_dataset(config, rank=0)
    assert sum(method == "HEAD" for method, _, _ in server.requests) == 6
    server.faults = {"val-00000.tar": Faulty("404")}
    with pytest.raises(DataError, match=rf"data.path = '{server.url}': .*lacks 1 of 1 val shards"):
        check_dataset(config, rank=0)


def test_what_is_a_url():
    for url in ("http://h/a", "https://h/a", "s3://b/a", "gs://b/a", "pipe:cat {}"):
        assert is_remote(url)
    for path in ("data/digits", "/data", "C:/data", Path("/data"), "a:b", ""):
        assert not is_remote(path)


def test_unknown_urls_and_missing_packages(settings, monkeypatch):
    with pytest.raises(DataError, match=r"foo is no kind of URL"):
        open_remote("foo://bucket/x", settings())
    real = __import__("fsspec").get_filesystem_class

    def without(protocol):
        if protocol in ("s3", "gs"):
            raise ImportError(f"install {protocol}")
        return real(protocol)

    monkeypatch.setattr("fsspec.get_filesystem_class", without)
    for protocol, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        with pytest.raises(MachineError, match=rf"'{protocol}://b/x' needs {package}; .*: pip install {package}"):
            open_remote(f"{protocol}://b/x", settings())


class TestPipe:
    """``pipe:``, the one way to a shell."""

    def test_it_is_off_unless_allowed(self, digits, settings, tmp_path):
        url = f"pipe:touch {tmp_path}/ran; cat {digits}/{{}}"
        with pytest.raises(ConfigError, match=r"would run a command in a shell.*data\.pipe=true"):
            load_index(url, settings(path=url))
        with pytest.raises(ConfigError, match="would run a command"):
            load_index(url)
        assert not (tmp_path / "ran").exists()

    def test_it_reads_through_the_cache(self, digits, settings, tmp_path):
        url = f"pipe:echo {{}} >> {tmp_path}/log; cat {digits}/{{}}"
        data = settings(path=url, pipe=True)
        check_shards(load_index(url, data), url, "train", settings=data)
        found = list(train(url, data, workers=2).batches(0, 30))
        assert all(same(a, b) for a, b in zip(train(digits, data).batches(0, 30), found, strict=True))
        names = (tmp_path / "log").read_text().split()
        assert sorted(n for n in names if n != "index.json") == sorted(set(names) - {"index.json"})

    def test_names_are_quoted(self, settings, tmp_path):
        remote = open_remote("pipe:printf %s {}", settings(pipe=True))
        name = f"a b'; touch {tmp_path}/owned; $(touch {tmp_path}/owned)\n\""
        assert remote.read(name, 1000).decode() == name
        assert not (tmp_path / "owned").exists()

    def test_failures_and_stalls(self, settings):
        data = settings(pipe=True, timeout=0.5)
        with pytest.raises(DataError, match=r"x of pipe:\*\*\* cannot be read \(exit code 3: no such host"):
            open_remote("pipe:echo no such host >&2; exit 3 # {}", data).read("x", 10)
        began = time.monotonic()
        with pytest.raises(DataError, match=r"no byte arrived for 0\.5 s; 3 attempts"):
            open_remote("pipe:echo $$; sleep 60 # {}", data).read("x", 10)
        assert time.monotonic() - began < 30
        with pytest.raises(DataError, match="more than 10 bytes"):
            open_remote("pipe:yes # {}", data).read("x", 10)
        with pytest.raises(ConfigError, match="names no file"):
            open_remote("pipe:cat", data)
        assert not [p for p in Path("/proc").glob("[0-9]*") if _is_child(p) and b"sleep" in _command(p)]


def _is_child(folder: Path) -> bool:
    try:
        return f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text()
    except OSError:
        return False


def _command(folder: Path) -> bytes:
    try:
        return (folder / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_forked_process_does_not_wait_for_its_parents_connections(server, settings):
    """What reads in the parent is collected in the workers, too: a second for each, while batches wait."""
    gc.freeze()  # collecting what other tests left takes its time as well
    remotes = [open_remote(server.url, settings()) for _ in range(5)]
    for remote in remotes:
        remote.read("index.json", 10**6)
    if not (child := os.fork()):
        began = time.monotonic()
        for remote in remotes:
            remote._pool.clear()
        gc.collect()
        os._exit(time.monotonic() - began > 2.5)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gc.unfreeze()
    for remote in remotes:
        remote.close()
    assert len(remotes[0].read("index.json", 10**6)) > 100  # and opens anew
    remotes[0].close()


def test_the_server_keeps_count(server: ShardServer):
    """The counting that others rely on, seen to count."""
    remote = open_remote(server.url, DataConfig(path=server.url))
    assert remote.size("val-00000.tar") == (server.folder / "val-00000.tar").stat().st_size
    assert len(remote.read("index.json", 10**6)) == (server.folder / "index.json").stat().st_size
    assert server.requests == [("HEAD", "val-00000.tar", None), ("GET", "index.json", None)]
    remote.close()
