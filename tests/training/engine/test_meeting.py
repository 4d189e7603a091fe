"""The ranks' meeting: a port in use, ranks that come late or never, and programs of others at the address."""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import suppress

import pytest
import torch.distributed as dist

from adaptive.doctor.checks.network import free_port
from adaptive.errors import MachineError, PassingError
from adaptive.training.engine import meeting
from tests.helpers.ranks import run_ranks


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """Make this process one of two ranks, the first if it does not say otherwise."""
    found = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found)}.items():
        monkeypatch.setenv(name, value)
    return found


def test_a_port_in_use_is_asked_for_again_and_then_told(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "PORT_WITHIN", 0.5)
    with socket.create_server(("", port)), pytest.raises(PassingError) as told:
        meeting.open_store(30, "a")
    assert f"MASTER_PORT = {port} is in use on {socket.gethostname()} by process {os.getpid()} (" in str(told.value)
    assert "deepspeed --master_port, torchrun --master-port, or export MASTER_PORT" in str(told.value)
    assert "\n" not in str(told.value)


def test_ranks_that_do_not_come_are_named(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(meeting, "QUIET", 0.2)
    with pytest.raises(PassingError, match=rf"1 of 2 ranks \(1\) have not reached rank 0 at .* MASTER_PORT = {port}: "):
        meeting.open_store(0.6, "a")
    assert caplog.text.count("ranks (1) have not reached rank 0") == 1


def test_a_rank_that_waits_for_the_first_says_where(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(meeting, "QUIET", 0.2)
    words = (
        rf"rank 1 on .* does not reach rank 0 at MASTER_ADDR = 127\.0\.0\.1, MASTER_PORT = {port} \(Connection refused"
    )
    with pytest.raises(PassingError, match=words):
        meeting.open_store(0.8, "a")
    assert caplog.text.count("waiting up to") == 1
    caplog.clear()
    with pytest.raises(PassingError):
        meeting.open_store(0.5, "a", silent=True)
    assert caplog.text == ""


def test_a_rank_of_another_machine_does_not_look_for_the_first_on_its_own_for_long(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(meeting, "ITS_OWN_WITHIN", 0.5)
    with pytest.raises(MachineError, match=r"MASTER_ADDR = 127\.0\.0\.1 is this machine itself, .* no rank 0") as told:
        meeting.open_store(30, "a")
    assert told.value.exit_code == 1


def test_a_program_of_others_at_the_address_is_not_waited_for_without_a_word(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch waits for ever for the answer of one that says nothing."""
    monkeypatch.setenv("RANK", "1")
    began = time.monotonic()
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(PassingError, match="something answers there, but not as rank 0 does"),
    ):
        meeting.open_store(1.0, "a")
    assert time.monotonic() - began < 10


def _late(seconds: list[float]) -> list[str]:
    """Meet, each rank after its time; rank 0 finds its port held for a while, as by the run before."""
    rank = int(os.environ["RANK"])
    logging.basicConfig()
    if rank == 0 and seconds[0] < 0:
        with socket.create_server(("", int(os.environ["MASTER_PORT"]))):
            time.sleep(-seconds[0])
    time.sleep(max(seconds[rank], 0))
    store = meeting.open_store(60, "a")
    store.set(f"said/{rank}", str(rank))
    said = [store.get(f"said/{other}").decode() for other in range(2)]
    store.set(f"heard/{rank}", "")
    if rank == 0:  # the store ends with it
        store.wait(["heard/1"])
    return said


@pytest.mark.ranks
@pytest.mark.full
@pytest.mark.parametrize("seconds", [[0, 3], [3, 0], [-3, 0]], ids=["the other late", "the first late", "port held"])
def test_ranks_that_come_late_meet(seconds: list[float]) -> None:
    assert run_ranks(_late, 2, seconds) == [["0", "1"]] * 2


def _in_use(port: int) -> str:
    """Start as the first of two ranks where another program has the port."""
    from adaptive.training.engine.group import init_distributed

    meeting.PORT_WITHIN = 0.5
    os.environ["MASTER_PORT"] = str(port)
    if os.environ["RANK"] == "1":
        return ""
    with suppress(dist.DistError):
        try:
            init_distributed(30, lambda store: None)
        except PassingError as error:
            return str(error)
    return "torch's own error"


@pytest.mark.ranks
@pytest.mark.full
def test_the_group_s_start_tells_of_the_port() -> None:
    with socket.create_server(("", 0)) as taken:
        said, _ = run_ranks(_in_use, 2, taken.getsockname()[1])
    assert "is in use on" in said


def _alone() -> str:
    """Start as the only rank, at the port that deepspeed gives to everybody."""
    from adaptive.training.engine.group import init_distributed

    with socket.create_server(("", 0)) as taken:
        os.environ.update(WORLD_SIZE="1", MASTER_PORT=str(taken.getsockname()[1]))
        init_distributed(30, lambda store: None)
        assert os.environ["MASTER_PORT"] != str(taken.getsockname()[1])
    return str(dist.get_world_size())


@pytest.mark.ranks
@pytest.mark.full
def test_one_rank_alone_needs_no_port() -> None:
    assert run_ranks(_alone, 1) == ["1"]
