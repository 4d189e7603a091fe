"""Which launcher started this process, and which of the ranks it is.

deepspeed, torchrun, srun and mpirun each tell it in variables of their own. They are brought into the one form that the
process group reads (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). What contradicts itself
is named here, before anything waits for ranks that never come.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import MutableMapping
from dataclasses import dataclass

from adaptive.distributed.launchers import ANOTHER_WAY, find_launcher, mpi_names, refuse_mixtures
from adaptive.distributed.master_address import LOOPBACK, check_master
from adaptive.distributed.network_interface import choose_interface
from adaptive.errors import MachineError

Environment = MutableMapping[str, str]

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ANY_PORT = "0"  # a rank alone takes a free one when it begins to listen, and keeps it
MOST_TRIED = 50
FIRST_PORT, PORTS = 20000, 12000  # below 32768, from where systems hand out ports to whoever asks


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, and how many processes train together.

    Attributes:
        rank: its number among all.
        local_rank: its number on this machine.
        world: how many there are.
        local_world: how many of them run on this machine.
        launcher: deepspeed, torchrun, srun, mpirun, alone, or another.
        device: number of its GPU among those that it sees; by default its local rank.
    """

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    local_world: int = 1
    launcher: str = "alone"
    device: int | None = None


def find_ranks(environment: Environment | None = None, patience: float = 0.0) -> Ranks:
    """Read the ranks that the launcher announces, completing the environment for the process group.

    Args:
        environment: of this process by default.
        patience: seconds to wait for MASTER_ADDR to be a name that is known: nodes that come late have none before.

    Raises:
        MachineError: the variables are incomplete or contradict each other, or MASTER_ADDR is no address of the first
            rank's machine; the message names them.
        PassingError: MASTER_ADDR was not known in time.
    """
    environment = os.environ if environment is None else environment
    launcher = find_launcher(environment)
    refuse_mixtures(environment, launcher)
    if launcher == "srun":
        _take_from_slurm(environment)
    elif launcher == "mpirun":
        _take_from_mpi(environment)
    elif launcher == "alone":
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=ANY_PORT)  # what the job's others meet by is not ours
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        raise MachineError(f"RANK is set but {', '.join(missing)} not; {ANOTHER_WAY}")
    if "LOCAL_WORLD_SIZE" not in environment and "LOCAL_SIZE" in environment:
        environment["LOCAL_WORLD_SIZE"] = environment["LOCAL_SIZE"]  # deepspeed's name for it
    rank, local_rank, world = (_number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    local_world = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else world
    if not 0 <= rank < world or not 0 <= local_rank < max(local_world, 1):
        raise MachineError(
            f"RANK = {rank} of WORLD_SIZE = {world} and LOCAL_RANK = {local_rank} of {local_world} on this machine "
            "contradict each other; they are set by the launcher, none may be set by hand"
        )
    known = "LOCAL_WORLD_SIZE" in environment
    several_hosts = local_world < world if known else world > 1 and environment["MASTER_ADDR"] not in LOOPBACK
    if world > 1 or launcher == "deepspeed":  # one rank alone needs no address, but deepspeed's is to be elsewhere
        # LOCAL_RANK may say the number of the GPU by now, which is not that of the task.
        numbered = environment.get("SLURM_PROCID") == environment["RANK"]
        on_host = _number(environment, "SLURM_LOCALID") if numbered and "SLURM_LOCALID" in environment else local_rank
        check_master(environment, launcher, rank, on_host, several_hosts, patience)
    choose_interface(environment, several_hosts, _nodes(environment, launcher))
    device = local_rank
    if launcher == "srun" and _gpu_of_its_own(environment):
        device = 0
        environment["LOCAL_RANK"] = "0"  # DeepSpeed takes it for the number of the GPU
    return Ranks(rank, local_rank, world, local_world, launcher, device)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as ``gpu[003-005,7],cpu1``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return (match.group(1) + (match.group(2) or "")) if match else ""


def free_port_of_job(environment: Environment) -> int:
    """Return a port for the ranks of a Slurm job to meet at, which is free on this machine, the job's first, by now.

    Another one for every job and every restart.
    """
    count = _restarts(environment)
    candidates = [FIRST_PORT + (count + 101 * further) % PORTS for further in range(MOST_TRIED)]
    return next((port for port in candidates if _is_free(port)), candidates[0])


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True


def _take_from_slurm(environment: Environment) -> None:
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    here = _tasks_of(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environment.get("SLURM_NODEID", "0")))
    if here:
        environment["LOCAL_WORLD_SIZE"] = str(here)
    environment.setdefault("MASTER_ADDR", first_host(_nodes(environment)) or "127.0.0.1")
    # The same number on every rank, another one for every step and every restart of a requeued job.
    count = _restarts(environment) + 101 * int(environment.get("SLURM_STEP_ID", "0"))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + count % PORTS))


def _tasks_of(per_node: str, node: int) -> int:
    """Return the tasks on one node of a list such as ``4(x2),3``; 0 where it says nothing."""
    for count, _, repeated in re.findall(r"(\d+)(\(x(\d+)\))?", per_node):
        node -= int(repeated or 1)
        if node < 0:
            return int(count)
    return 0


def _gpu_of_its_own(environment: Environment) -> bool:
    """Whether Slurm shows every task its own GPU only, which is then number 0."""
    bound = any(name in environment for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK"))
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES", ""))
    return bound and len(visible.split(",")) == 1


def _take_from_mpi(environment: Environment) -> None:
    names = mpi_names(environment)
    assert names is not None, "mpirun was found by these names"
    for name, theirs in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), names, strict=True):
        if theirs in environment:
            environment[name] = environment[theirs]
    if environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"] == "1":
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", ANY_PORT)
    elif "SLURM_JOB_NODELIST" in environment:
        # The step is not everybody's: mpirun's own node has none, the others' is that of its daemons. Rank 0 checks the
        # address; another mpirun in the same job has another name space.
        environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_JOB_NODELIST"]))
        count = _restarts(environment) + zlib.crc32(environment.get("PMIX_NAMESPACE", "").encode())
        environment.setdefault("MASTER_PORT", str(FIRST_PORT + count % PORTS))
    elif not {"MASTER_ADDR", "MASTER_PORT"} <= set(environment):
        raise MachineError(
            f"started by mpirun ({names[0]} = {environment[names[0]]}), which does not say where the ranks meet; "
            f"give mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT, or start with deepspeed, torchrun or srun"
        )


def _nodes(environment: Environment, launcher: str = "srun") -> str:
    if launcher == "srun" and "SLURM_STEP_NODELIST" in environment:
        return environment["SLURM_STEP_NODELIST"]
    return environment.get("SLURM_JOB_NODELIST", "")


def _restarts(environment: Environment) -> int:
    """Return a number of the job and its restart, from which ports are counted."""
    return int(environment.get("SLURM_JOB_ID", "0")) + 7 * int(environment.get("SLURM_RESTART_COUNT", "0"))


def _number(environment: Environment, name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise MachineError(f"{name} = {environment[name]!r} is no number; it is set by the launcher") from None
