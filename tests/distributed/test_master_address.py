"""MASTER_ADDR is an address of the first rank's machine, or one line says that it is not."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from adaptive.distributed import master_address, network_interface
from adaptive.distributed.ranks import find_ranks
from adaptive.errors import EXIT_PASSING, MachineError, PassingError
from tests.distributed.test_ranks import DEEPSPEED, SRUN, TORCHRUN, outside

ELSEWHERE = "192.0.2.77"  # nobody's (RFC 5737)
FIRST = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.fixture
def _refused_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that refuses connections answers at once; nobody's address would take its time."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.mark.usefixtures("_refused_elsewhere")
@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        # deepspeed --include node1:0, called on node0
        ({**DEEPSPEED, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}, "add --force_multi"),
        ({**DEEPSPEED, "RANK": "0", "LOCAL_RANK": "0"}, "call it there"),
        ({**SRUN, **FIRST}, f"set MASTER_ADDR to an address of {socket.gethostname()}"),
    ],
)
def test_an_address_that_is_not_here_is_told_at_once(environment: dict[str, str], remedy: str) -> None:
    began = time.monotonic()
    with pytest.raises(MachineError) as refused:
        find_ranks({**environment, "MASTER_ADDR": ELSEWHERE, "MASTER_PORT": "29517"})
    assert time.monotonic() - began < 2
    assert f"MASTER_ADDR = {ELSEWHERE} is no address of {socket.gethostname()}, where rank 0 runs (it has " in str(
        refused.value
    )
    assert remedy in str(refused.value)
    assert refused.value.exit_code == 1


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({**SRUN, **FIRST, "MASTER_ADDR": "127.0.0.1"}, True),
        ({**SRUN, **FIRST, "MASTER_ADDR": "localhost"}, True),
        ({**SRUN, "SLURM_LOCALID": "0", "MASTER_ADDR": "127.0.1.1"}, True),  # rank 5, the first of its machine
        ({**TORCHRUN, "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}, True),
        ({**TORCHRUN, "MASTER_ADDR": "localhost"}, False),  # one of each machine is enough
        ({**DEEPSPEED, "MASTER_ADDR": "localhost"}, False),  # all on one machine
    ],
)
def test_the_loopback_is_told_to_be_no_address_for_several_machines(
    environment: dict[str, str], told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    find_ranks(environment)
    assert caplog.text.count(f"is this machine itself, {socket.gethostname()}, and on every other one") == told
    assert not told or f"MASTER_ADDR = {environment['MASTER_ADDR']}" in caplog.text


@pytest.mark.skipif(outside() is None, reason="this machine has no network interface but the loopback")
def test_a_first_rank_s_own_name_may_be_debian_s_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: ask(
        "127.0.1.1" if host == "node0" else host, *rest, **more
    ))  # fmt: skip
    assert find_ranks({**SRUN, **FIRST, "MASTER_ADDR": "node0"}).rank == 0


def test_an_address_that_is_translated_on_the_way_here_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda address, **more: connect(("127.0.0.1", address[1]), **more))
    environment = {**DEEPSPEED, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": ELSEWHERE, "MASTER_PORT": str(port)}
    assert find_ranks(environment).rank == 0
    # What answers there is another machine's program.
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(socket, "create_connection", lambda address, **more: connect(other.getsockname(), **more))
        monkeypatch.setattr(master_address, "ANSWER_WITHIN", 0.3)
        with pytest.raises(MachineError, match="is no address of"):
            find_ranks(dict(environment))


def test_a_name_that_gets_known_late_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(network_interface, "PAUSE", 0.05)
    ask, due = socket.getaddrinfo, time.monotonic() + 0.4

    def later(host: Any, *rest: Any, **more: Any) -> Any:
        if host == "node0" and time.monotonic() < due:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask("127.0.0.1" if host == "node0" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", later)
    first = {**DEEPSPEED, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "node0"}
    with pytest.raises(PassingError, match=r"MASTER_ADDR = 'node0' is no host that .* knows \(Name or service") as late:
        find_ranks(dict(first))
    assert late.value.exit_code == EXIT_PASSING
    assert find_ranks(dict(first), patience=30).rank == 0
    assert "MASTER_ADDR = 'node0' is not known on " in caplog.text
    assert caplog.text.count("waiting up to 30 s") == 1


def test_a_port_that_is_in_use_is_not_taken_for_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meeting tells of it, with the port."""
    with socket.create_server(("", 0)) as taken:
        environment = {**DEEPSPEED, "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": ELSEWHERE}
        assert find_ranks({**environment, "MASTER_PORT": str(taken.getsockname()[1])}).rank == 0
