"""Heartbeats between real processes: who is killed, stopped, behind or ends with an error is named by the others."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from adaptive.doctor.checks.network import free_port
from adaptive.errors import EXIT_HUNG
from adaptive.files import write_atomically
from adaptive.training.supervision.machine_load import MachineLoad, system_values
from adaptive.training.supervision.peers import Peers, host_name
from tests.helpers.ranks import fork_context, rank_environment
from tests.helpers.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.ranks
INTERVAL = 0.1


class Group:
    """Processes that do nothing but live, as many as there are ranks; the store's server is rank 0's."""

    def __init__(self, folder: Path, world: int, limit: float, wait: str = "") -> None:
        self.folder = folder
        port = free_port()
        context = fork_context()
        self.processes = [
            context.Process(target=_live, args=(str(folder), rank, world, limit, port, wait)) for rank in range(world)
        ]
        for process in self.processes:
            process.start()
        wait_until(lambda: _all_hear(folder, world), lambda: [self.told(rank) for rank in range(world)])

    def told(self, rank: int) -> str:
        return (self.folder / f"log-{rank}").read_text()

    def codes(self, *ranks: int) -> list[int]:
        for rank in ranks:
            self.processes[rank].join(PATIENCE)
        return [self.processes[rank].exitcode for rank in ranks]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def group(tmp_path, request):
    started = Group(tmp_path, *request.param)
    yield started
    started.kill()


def _all_hear(folder: Path, world: int) -> bool:
    return len(list(folder.glob("hears-*"))) == world


def _live(folder: str, rank: int, world: int, limit: float, port: int, what: str) -> None:
    descriptor = os.open(f"{folder}/log-{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(rank_environment(rank, world, port))
    server = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if rank == 0 else None
    serving = Path(folder) / "serving"
    if server is not None:
        serving.touch()
    wait_until(serving.exists)
    machine = MachineLoad(torch.device("cpu"), whole=rank % 2 == 0)
    progress = 4 if what == "behind" and rank == 2 else 7, "step"
    peers = Peers(rank, world, limit, lambda: progress, machine.sample, INTERVAL).start()
    wait_until(lambda: len(peers.heartbeats) >= (world if rank == 0 else 1))  # the others hear the first rank alone
    write_atomically(Path(folder) / f"hears-{rank}", repr(peers.machines()))
    wait_until(lambda: _all_hear(Path(folder), world))
    if what == "error" and rank == 1:
        peers.end("data.path is gone")
    elif what in ("error", "behind", "account"):
        time.sleep(20 * INTERVAL)
        sys.stderr.write(f"account: {peers.account()}\n")
    elif what == "end":
        peers.end()
    (Path(folder) / f"done-{rank}").touch()
    if what and what != "account" and rank == 0:  # the store's server goes last
        wait_until(lambda: len(list(Path(folder).glob("done-*"))) == world)
    if not what or rank == 0:
        time.sleep(4.0 if what else 60.0)
    del server
    os._exit(0)


@pytest.mark.parametrize("group", [(3, 2.5, "")], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_silent_rank_is_named_and_all_others_end(group: Group, number: int) -> None:
    os.kill(group.processes[1].pid, number)
    began = time.monotonic()
    assert group.codes(0, 2) == [EXIT_HUNG, EXIT_HUNG]
    assert time.monotonic() - began < 20
    for rank in (0, 2):
        assert f"rank {rank} on {host_name()}: nothing was heard from rank 1 on {host_name()} for " in group.told(rank)
        assert "it was at step 7 (train.peer_timeout = 2.5): its node or the network is down" in group.told(rank)


@pytest.mark.parametrize("group", [(2, 2.5, "")], indirect=True)
def test_a_silent_first_rank_is_named(group: Group) -> None:
    os.kill(group.processes[0].pid, signal.SIGSTOP)
    assert group.codes(1) == [EXIT_HUNG]
    assert f"rank 1 on {host_name()}: rank 0 on {host_name()} cannot be reached" in group.told(1)


@pytest.mark.parametrize("group", [(2, 2.5, "")], indirect=True)
def test_all_stopped_for_a_while_go_on(group: Group) -> None:
    """As a scheduler suspends a job: nobody's silence counts."""
    for process in group.processes:
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(5)
    for process in group.processes:
        os.kill(process.pid, signal.SIGCONT)
    time.sleep(4)
    assert [process.is_alive() for process in group.processes] == [True, True], group.told(0) + group.told(1)


@pytest.mark.parametrize("group", [(3, 30.0, "error")], indirect=True)
def test_what_a_rank_said_when_it_ended_is_quoted(group: Group) -> None:
    group.codes(0, 1, 2)
    for rank in (0, 2):
        assert f"account: rank 1 on {host_name()} ended: data.path is gone" in group.told(rank)


@pytest.mark.parametrize("group", [(3, 30.0, "behind")], indirect=True)
def test_a_rank_that_lags_is_named(group: Group) -> None:
    group.codes(0, 1, 2)
    for rank in (0, 1):
        assert f"account: rank 2 on {host_name()} is behind: at step 4 of 7, in stage 'step'" in group.told(rank)


@pytest.mark.parametrize("group", [(2, 30.0, "account")], indirect=True)
def test_a_killed_rank_is_named_when_asked(group: Group) -> None:
    group.processes[1].kill()
    group.codes(0)
    assert f"account: nothing was heard from rank 1 on {host_name()} for " in group.told(0)


@pytest.mark.parametrize("group", [(3, 2.5, "end")], indirect=True)
def test_a_good_end_is_no_silence(group: Group) -> None:
    assert group.codes(0, 1, 2) == [0, 0, 0]
    assert group.told(0) == ""
    machines = eval((group.folder / "hears-0").read_text())
    assert set(machines) == {host_name()}
    assert {"cpu_percent", "memory_percent", "sent_mib_s", "received_mib_s"} <= set(machines[host_name()])


def test_many_nodes_are_summed_up() -> None:
    few = {f"node{i}": {"cpu_percent": float(i), "gpu0_percent": 50.0} for i in range(8)}
    assert system_values(few)["system/node3/cpu_percent"] == 3.0
    assert len(system_values(few)) == 16
    many = {f"node{i}": {"cpu_percent": float(i), "gpu0_percent": 50.0, "gpu1_percent": float(i)} for i in range(9)}
    values = system_values(many)
    assert values["system/all/cpu_percent_min"] == 0.0
    assert values["system/all/cpu_percent_mean"] == 4.0
    assert values["system/all/gpu_percent_max"] == 50.0
    assert values["system/all/gpu_percent_min"] == 0.0
    assert len(values) == 6
