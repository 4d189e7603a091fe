"""Launchers inside launchers: the environments of launchers.json are those that a cluster of three nodes gave."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from adaptive.distributed import ranks
from adaptive.distributed.launchers import announced_rank, one_of_several, started_by_mpirun
from adaptive.distributed.ranks import find_ranks
from adaptive.errors import MachineError
from tests.distributed.test_ranks import DEEPSPEED, MPIRUN, SRUN, TORCHRUN

RECORDED: dict[str, list[dict[str, str]]] = json.loads(
    Path(__file__).with_name("launchers.json").read_text(encoding="utf-8")
)
HOSTS = {"node0": "198.51.100.10", "node1": "198.51.100.11", "node2": "198.51.100.12"}


@pytest.fixture
def _on_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are known, and node0's address is this machine's."""
    ask = socket.getaddrinfo

    def known(host: Any, *rest: Any, **more: Any) -> Any:
        return ask(HOSTS.get(host, host), *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", known)
    monkeypatch.setattr("adaptive.distributed.master_address._can_be_bound", lambda address: True)


@pytest.mark.usefixtures("_on_the_cluster")
@pytest.mark.parametrize(
    ("nesting", "launcher", "world", "here"),
    [
        ("srun", "srun", 6, 2),
        ("srun in salloc", "srun", 6, 2),
        ("srun --mpi=pmi2", "srun", 6, 2),
        ("srun in srun", "srun", 2, 2),
        ("srun of one task", "alone", 1, 1),
        ("mpirun in sbatch", "mpirun", 6, 2),
        ("mpirun of MPICH in sbatch", "mpirun", 6, 2),
        ("mpirun of MPICH over ssh in sbatch", "mpirun", 6, 2),
        ("torchrun in srun", "torchrun", 6, 2),
        ("deepspeed in sbatch", "deepspeed", 2, 2),
        ("torchrun in mpirun in sbatch", "torchrun", 6, 2),
        ("srun in mpirun of one process", "srun", 6, 2),
    ],
)
def test_the_innermost_launcher_counts(nesting: str, launcher: str, world: int, here: int) -> None:
    recorded = [{key: value for key, value in one.items() if key != "host"} for one in RECORDED[nesting]]
    announced = [announced_rank(environment) for environment in recorded]
    found = [find_ranks(environment) for environment in recorded]
    assert {one.launcher for one in found} == {launcher}
    assert sorted(one.rank for one in found) == list(range(world))
    assert [one.rank for one in found] == announced
    assert {(one.world, one.local_world) for one in found} == {(world, here)}
    assert sorted(one.local_rank for one in found) == sorted(list(range(here)) * (world // here))
    assert len({(e["MASTER_ADDR"], e["MASTER_PORT"]) for e in recorded}) == 1, "the ranks would not meet"
    assert world == 1 or all(map(one_of_several, recorded))
    again = [find_ranks(environment) for environment in recorded]  # as where an error is told to the others
    assert [(one.rank, one.world) for one in again] == [(one.rank, one.world) for one in found]


def test_a_batch_script_is_none_of_its_tasks() -> None:
    with pytest.raises(MachineError, match="this is the batch script of Slurm job 1 with 6 tasks"):
        find_ranks(dict(RECORDED["batch script"][0]))


@pytest.mark.usefixtures("_on_the_cluster")
def test_mpirun_in_a_job_meets_at_its_first_node_at_a_port_of_its_own() -> None:
    first = RECORDED["mpirun in sbatch"][0]
    met = {}
    for what, changed in (
        ("mpirun", {}),
        ("another one", {"PMIX_NAMESPACE": "5"}),
        ("the next start", {"SLURM_RESTART_COUNT": "1"}),
    ):
        environment = {**first, **changed}
        find_ranks(environment)
        met[what] = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    assert {host for host, _ in met.values()} == {"node0"}
    assert len(set(met.values())) == 3
    assert all(20000 <= port < 32768 for _, port in met.values())


SRUN_OF_THREE = {**SRUN, "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        # deepspeed and mpirun start all ranks of a node, as torchrun does
        (
            {**SRUN, **DEEPSPEED},
            ["srun started 4 deepspeeds on each node (SLURM_STEP_TASKS_PER_NODE = 4,3)"],
        ),
        (
            {**SRUN, **MPIRUN},
            ["srun started 4 mpiruns on each node", "--ntasks-per-node=1, or srun without mpirun"],
        ),
        (
            {**MPIRUN, **TORCHRUN},
            ["mpirun started 2 torchruns on each node (OMPI_COMM_WORLD_LOCAL_SIZE = 2)", "--map-by ppr:1:node"],
        ),
        # each of them by itself
        (
            {**SRUN_OF_THREE, **TORCHRUN, "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "0"},
            ["srun started 3 torchruns (SLURM_STEP_NUM_TASKS = 3)", "(GROUP_WORLD_SIZE = 1)", "torchrun --nnodes 3"],
        ),
        (
            {**SRUN_OF_THREE, **DEEPSPEED},
            ["srun started 3 deepspeeds (SLURM_STEP_NUM_TASKS = 3)", "(CROSS_SIZE = 1)", "deepspeed --hostfile HOSTS"],
        ),
        # mpirun's daemons, or ranks?
        (
            {**SRUN_OF_THREE, **MPIRUN, "OMPI_COMM_WORLD_SIZE": "1"},
            ["one process (OMPI_COMM_WORLD_SIZE = 1)", "3 tasks (SLURM_STEP_NUM_TASKS = 3)", "env -u SLURM_PROCID"],
        ),
        # left over from the shell of the submission
        ({**MPIRUN, "RANK": "0", "WORLD_SIZE": "2"}, ["RANK = 0 was set before mpirun", "OMPI_COMM_WORLD_RANK is 1"]),
        (
            {**SRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"},
            [
                "WORLD_SIZE = 8 was set before srun",
                "SLURM_STEP_NUM_TASKS is 7",
                "unset RANK, WORLD_SIZE",
            ],
        ),
    ],
)
def test_contradicting_launchers_are_named_with_their_variables(environment: dict[str, str], parts: list[str]) -> None:
    with pytest.raises(MachineError) as refused:
        find_ranks(dict(environment))
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


def test_launchers_that_fit_together_are_left_alone() -> None:
    terminal = {
        **SRUN,
        "SLURM_PROCID": "0",
        "SLURM_PTY_PORT": "40000",
    }  # of srun --pty only the first task lives
    assert find_ranks({**terminal, **DEEPSPEED}).launcher == "deepspeed"
    elastic = {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert find_ranks({**SRUN_OF_THREE, **TORCHRUN, **elastic}).world == 4
    # deepspeed --launcher mpich gives its ranks RANK, and hydra's daemons are tasks of srun
    hydra = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    named = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_PORT": "29500"}
    assert find_ranks({**SRUN_OF_THREE, **hydra, **named}).rank == 3


def test_mpirun_s_terminal_is_nobody_s() -> None:
    mpi = [name for name in RECORDED if "mpirun" in name]
    assert len(mpi) == 5
    for name, recorded in RECORDED.items():
        assert {started_by_mpirun(one) for one in recorded} == {name in mpi}, name


def test_one_rank_alone_does_not_look_for_the_job_s_others() -> None:
    environment = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500", "SLURM_JOB_ID": "7"}
    assert find_ranks(environment).world == 1
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "0")


def test_a_job_s_port_is_one_that_is_free() -> None:
    job = {"SLURM_JOB_ID": "11", "SLURM_RESTART_COUNT": "0"}
    first = ranks.free_port_of_job(job)
    with socket.create_server(("", first)):
        second = ranks.free_port_of_job(job)
        assert second not in (first, ranks.free_port_of_job({**job, "SLURM_RESTART_COUNT": "1"}))
        socket.create_server(("", second)).close()
