"""Which launcher started a process: what each one says, and what contradicts itself."""

from typing import Any

import psutil
import pytest

from adaptive.distributed.launchers import find_launcher
from adaptive.distributed.network_interface import choose_interface, interface_of, interfaces
from adaptive.distributed.ranks import find_ranks, first_host
from adaptive.errors import MachineError
from adaptive.training.run import Ranks

LOOPBACK = interface_of(["127.0.0.1"])
SRUN = {
    "SLURM_JOB_ID": "100", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "localhost,other", "MASTER_ADDR": "127.0.0.1",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
DEEPSPEED = {
    "CROSS_RANK": "0", "CROSS_SIZE": "1", "LOCAL_SIZE": "2", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Ranks(0, 0, 1, 1, "alone", 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, Ranks(0, 0, 1, 1, "alone", 0)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, Ranks(0, 0, 1, 1, "alone", 0)),
        (SRUN, Ranks(5, 1, 7, 3, "srun", 1)),
        ({**SRUN, "SLURM_GPUS_PER_TASK": "1", "CUDA_VISIBLE_DEVICES": "3"}, Ranks(5, 1, 7, 3, "srun", 0)),
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Ranks(5, 1, 7, 3, "srun", 1)),
        (TORCHRUN, Ranks(3, 1, 4, 2, "torchrun", 1)),
        ({**SRUN, **TORCHRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, Ranks(3, 1, 4, 2, "torchrun", 1)),
        (DEEPSPEED, Ranks(1, 1, 2, 2, "deepspeed", 1)),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1", **DEEPSPEED}, Ranks(1, 1, 2, 2, "deepspeed", 1)),
        (MPIRUN, Ranks(1, 1, 2, 2, "mpirun", 1)),
    ],
)
def test_ranks(environment: dict[str, str], expected: Ranks) -> None:
    environment = dict(environment)
    assert find_ranks(environment) == expected
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(environment)
    assert environment["RANK"] == str(expected.rank)
    again = find_ranks(dict(environment))  # what was completed is understood as well
    assert (again.rank, again.world) == (expected.rank, expected.world)


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"RANK": "0"}, ["RANK is set", "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE = 4 is set but RANK is not", "torchrun"]),
        ({**DEEPSPEED, "RANK": "2"}, ["RANK = 2 of WORLD_SIZE = 2", "contradict"]),
        ({**DEEPSPEED, "LOCAL_RANK": "2"}, ["LOCAL_RANK = 2 of 2", "contradict"]),
        ({**DEEPSPEED, "RANK": "one"}, ["RANK = 'one' is no number"]),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ["Slurm job 7 with 4 tasks", "srun"]),
        (
            {**SRUN, **TORCHRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            ["srun started 4 torchruns on each node", "--ntasks-per-node=1"],
        ),
        ({**SRUN, "RANK": "0", "WORLD_SIZE": "7"}, ["RANK = 0 was set before srun", "SLURM_PROCID is 5", "unset RANK"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ["PMI_RANK = 1", "start with deepspeed"]),
        (
            {key: value for key, value in MPIRUN.items() if not key.startswith("MASTER")},
            ["mpirun (OMPI_COMM_WORLD_RANK = 1)", "-x MASTER_ADDR=HOST"],
        ),
        ({**SRUN, "MASTER_ADDR": "no-such-host.invalid"}, ["MASTER_ADDR = 'no-such-host.invalid'", "hostname -I"]),
        ({**DEEPSPEED, "GLOO_SOCKET_IFNAME": "nope0"}, ["GLOO_SOCKET_IFNAME = 'nope0'", "it has", LOOPBACK]),
        ({**DEEPSPEED, "NCCL_SOCKET_IFNAME": "=nope0"}, ["NCCL_SOCKET_IFNAME = '=nope0'", "unset it"]),
    ],
)
def test_contradictions_are_named(environment: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(MachineError) as refused:
        find_ranks(dict(environment))
    for part in parts:
        assert part in str(refused.value)


def test_a_requeued_job_and_every_step_meet_at_another_port() -> None:
    def port(**changed: str) -> int:
        environment = {**SRUN, **changed}
        find_ranks(environment)
        return int(environment["MASTER_PORT"])

    ports = {port(), port(SLURM_RESTART_COUNT="1"), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="101")}
    assert len(ports) == 4
    assert all(20000 <= number < 32768 for number in ports)
    assert port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0") == port()
    assert port(MASTER_PORT="1234") == 1234


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[003-005,7],cpu1", "gpu003"), ("node1", "node1"), ("a,b[1-2]", "a"), ("", ""), ("n[7,9]", "n7")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def outside() -> tuple[str, str] | None:
    """An interface with an IPv4 address that is not the loopback's."""
    for name, addresses in interfaces().items():
        for address in addresses:
            if ":" not in address and not address.startswith("127."):
                return name, address
    return None


def test_ranks_of_one_machine_talk_over_the_loopback_interface() -> None:
    environment = dict(DEEPSPEED)
    find_ranks(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == LOOPBACK


@pytest.mark.skipif(outside() is None, reason="this machine has no network interface but the loopback")
def test_several_hosts_talk_over_the_interface_towards_the_master() -> None:
    name, address = outside() or ("", "")
    environment: dict[str, Any] = {"MASTER_ADDR": address}
    assert choose_interface(environment, several_hosts=True) == name
    assert environment == {"MASTER_ADDR": address, "GLOO_SOCKET_IFNAME": name}


def test_what_the_user_sets_stays() -> None:
    mine = next(name for name in psutil.net_if_addrs())
    environment = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": mine, "NCCL_SOCKET_IFNAME": "^docker,lo"}
    assert choose_interface(environment, several_hosts=True) == mine
    assert environment["GLOO_SOCKET_IFNAME"] == mine


def test_launchers_by_name() -> None:
    assert find_launcher({}) == "alone"
    assert find_launcher({"RANK": "0"}) == "another"
