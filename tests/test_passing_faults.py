"""Faults that pass by themselves are told from mistakes, tried again, and end with a code that requeues."""

from __future__ import annotations

import argparse
import errno
import os
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from adaptive import passing_faults
from adaptive.commands import train as command
from adaptive.config.loading import load_config
from adaptive.config.sections import DataConfig
from adaptive.data.remote.urls import open_remote
from adaptive.data.shards.index import load_index
from adaptive.errors import (
    EXIT_PASSING,
    EXIT_PEER,
    AdaptiveError,
    ConfigError,
    DataError,
    MachineError,
    PeerError,
    StoppedError,
)
from adaptive.jobs.requeue import outcome, worth_another_try
from adaptive.passing_faults import exit_code_of, passing, patiently
from adaptive.training import preflight
from adaptive.training.checkpoints.store import CheckpointStore
from adaptive.training.preflight import check_run_folder

ADDRESS = ("node0", 20101)
PASSING = [
    *(OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EINTR)),
    *(OSError(number, os.strerror(number)) for number in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.ENETUNREACH)),
    *(OSError(number, os.strerror(number)) for number in (errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH)),
    OSError(errno.ENOTCONN, "Transport endpoint is not connected"),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    TimeoutError("no byte arrived for 30 s"),
    dist.DistNetworkError("The server socket has failed to listen on any local network address. port: 29500, useIpv6: "
        "false, code: -98, name: EADDRINUSE, message: address already in use"),
    dist.DistNetworkError(f"The client socket has timed out after 60000ms while trying to connect to {ADDRESS}."),
    dist.DistNetworkError(f"The IPv4 network addresses of {ADDRESS} cannot be retrieved (gai error: -3 - Temporary "
        "failure in name resolution)."),
    dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
    RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] no error"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:799] connect [10.0.0.1]:1822: No route to host"),
    RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:2251, unhandled system error, NCCL version 2.29"),
    RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable"),
]  # fmt: skip
LASTING = [
    OSError(errno.ENOENT, "No such file or directory"),
    OSError(errno.EACCES, "Permission denied"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EROFS, "Read-only file system"),
    RuntimeError("a size mismatch"),
    ValueError("connection refused"),
    ConfigError("unknown key train.epoch"),
    RuntimeError("CUDA error: no kernel image is available for execution on the device"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda error: str(error)[:40])
def test_what_may_have_passed_by_the_next_start(error: Exception) -> None:
    assert passing(error)
    assert exit_code_of(error) == EXIT_PASSING
    with pytest.raises(DataError) as wrapped:
        _replaced_by_a_message(error)
    assert exit_code_of(wrapped.value) == EXIT_PASSING, "the cause counts"


def _replaced_by_a_message(error: Exception) -> None:
    try:
        raise error
    except Exception:
        raise DataError("data.path = 'x' cannot be read") from None


@pytest.mark.parametrize("error", LASTING, ids=lambda error: str(error)[:40])
def test_what_another_start_would_meet_again(error: Exception) -> None:
    assert not passing(error)
    assert exit_code_of(error) == 1


def test_other_codes_stay_and_jobs_start_again_after_this_one() -> None:
    assert exit_code_of(StoppedError("saved")) == 75
    assert exit_code_of(PeerError("gone")) == EXIT_PEER
    assert worth_another_try(EXIT_PASSING)
    assert outcome({0: EXIT_PASSING, 1: EXIT_PASSING}, 143, False) == EXIT_PASSING
    assert outcome({0: EXIT_PASSING, 1: 1}, 143, False) == 1, "a mistake on one rank is met again"


class Hiccup:
    """A file whose first reads fail, as those of a file server that fails over do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int, method: str = "open"):
        self.left, real = times, getattr(Path, method)

        def read(path: Path, *arguments: Any, **more: Any) -> Any:
            if path.name == name and self.left:
                self.left -= 1
                raise OSError(number, os.strerror(number), str(path))
            return real(path, *arguments, **more)

        monkeypatch.setattr(Path, method, read)
        monkeypatch.setattr(passing_faults, "FIRST_PAUSE", 0.01)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_hiccup_of_the_file_system_is_waited_for(
    number: int, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {backbone: resnet18}\ndata: {path: x}\n")
    hiccup = Hiccup(monkeypatch, "run.yaml", number, 2)
    assert load_config(file).data.path == "x"
    assert (hiccup.left, caplog.text.count("trying again")) == (0, 2)
    hiccup = Hiccup(monkeypatch, "index.json", number, 2)
    assert len(load_index(digits).classes) == 10
    assert hiccup.left == 0


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_the_newest_checkpoint_is_not_passed_over_for_a_hiccup(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {}, {}, None)
    Hiccup(monkeypatch, name, errno.ESTALE, 3)
    newest, passed_over = store.newest_valid()
    assert (newest and newest.step, passed_over) == (2, [])


def test_a_checkpoint_that_cannot_be_read_for_long_is_left_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, {}, {}, None)
    Hiccup(monkeypatch, "state.json", errno.EIO, 1000)
    monkeypatch.setattr(passing_faults, "PATIENCE", 0.05)
    with pytest.raises(AdaptiveError, match=r"step-00000002 cannot be read \(Input/output error\), and") as told:
        store.newest_valid()
    assert exit_code_of(told.value) == EXIT_PASSING


def test_a_hiccup_that_lasts_ends_with_the_file_and_a_code_to_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {backbone: resnet18}\ndata: {path: x}\n")
    Hiccup(monkeypatch, "run.yaml", errno.EIO, 1000)
    monkeypatch.setattr(passing_faults, "PATIENCE", 0.05)
    with pytest.raises(ConfigError, match=r"run\.yaml cannot be read: Input/output error") as told:
        load_config(file)
    assert exit_code_of(told.value) == EXIT_PASSING

    def failing(dir: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(preflight, "TemporaryFile", failing)
    with pytest.raises(MachineError, match="cannot be written: Input/output error") as told:
        check_run_folder(tmp_path)
    assert exit_code_of(told.value) == EXIT_PASSING


def test_what_is_missing_is_not_waited_for(tmp_path: Path) -> None:
    tried = []

    def attempt() -> None:
        tried.append(1)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    with pytest.raises(FileNotFoundError):
        patiently(attempt, tmp_path)
    assert tried == [1]


def test_a_store_that_is_away_at_the_start_may_be_back_at_the_next(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = DataConfig(path=f"http://127.0.0.1:{port}/set", attempts=1)
    with closing(open_remote(settings.path, settings)) as store, pytest.raises(DataError, match="be read") as away:
        store.read("index.json", 1000)
    assert exit_code_of(away.value) == EXIT_PASSING
    (tmp_path / "set").mkdir()
    settings = DataConfig(path=f"file://{tmp_path}/set", attempts=1)
    with closing(open_remote(settings.path, settings)) as store, pytest.raises(DataError, match="not exist") as missing:
        store.read("index.json", 1000)
    assert exit_code_of(missing.value) == 1


def test_a_fault_that_nobody_foresaw_is_told_in_a_line_and_left_for_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a traceback with a code that says: another start would meet it again."""
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{backbone: resnet18}}\ndata: {{path: x}}\ntrain: {{run_folder: {tmp_path}/run}}\n")

    def fail(_: object) -> int:
        raise OSError(errno.ESTALE, "Stale file handle", "/data/shard-000000.tar")

    monkeypatch.setattr(command, "_train", fail)
    monkeypatch.setenv("ADAPTIVE_RESULTS", str(tmp_path))
    words = argparse.Namespace(help_config=False, print_config=False, config=str(file), overrides=[])
    assert command.run(words) == EXIT_PASSING
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "adaptive train: error: [Errno 116] Stale file handle: '/data/shard-000000.tar' [OSError]: the"
    )
    assert "the same command, started again, goes on from the newest checkpoint" in line
    assert (tmp_path / "rank-0").read_text() == f"{EXIT_PASSING}\n"
