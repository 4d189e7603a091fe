"""Which launcher started this process, and which of the ranks it is.

deepspeed, torchrun, srun and mpirun each tell it in variables of their own. They are brought into the one form that the
process group reads (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT). What contradicts itself
is named here, before anything waits for ranks that never come.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass

from adaptive.distributed.network_interface import choose_interface
from adaptive.errors import MachineError

Environment = MutableMapping[str, str]

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ANOTHER_WAY = "start with deepspeed, torchrun or srun, or unset it"
# How MPI's launchers number the processes; the first that is set counts.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY_PORT = "0"  # a rank alone takes a free one when it begins to listen, and keeps it
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


def find_ranks(environment: Environment | None = None) -> Ranks:
    """Read the ranks that the launcher announces, completing the environment for the process group.

    Raises:
        MachineError: the variables are incomplete or contradict each other; the message names them.
    """
    environment = os.environ if environment is None else environment
    launcher = find_launcher(environment)
    _refuse_mixtures(environment, launcher)
    if launcher == "srun":
        _take_from_slurm(environment)
    elif launcher == "mpirun":
        _take_from_mpi(environment)
    elif launcher == "alone":
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", ANY_PORT)
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
    choose_interface(environment, several_hosts, _nodes(environment))
    device = local_rank
    if launcher == "srun" and _gpu_of_its_own(environment):
        device = 0
        environment["LOCAL_RANK"] = "0"  # DeepSpeed takes it for the number of the GPU
    return Ranks(rank, local_rank, world, local_world, launcher, device)


def find_launcher(environment: Environment) -> str:
    """Return deepspeed, torchrun, srun, mpirun, or alone; "another" where only RANK is known."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    if "RANK" in environment:
        return "deepspeed" if "CROSS_SIZE" in environment else "another"
    if _tasks(environment) > 1:
        return "srun"
    if any(rank in environment for rank, *_ in MPI):
        return "mpirun"
    return "alone"


def one_of_several(environment: Environment) -> bool:
    """Tell whether a launcher started this process as one of several; a batch script is not one of its tasks."""
    sizes = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    return any(environment.get(name, "1") != "1" for name in sizes)


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as ``gpu[003-005,7],cpu1``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return (match.group(1) + (match.group(2) or "")) if match else ""


def _tasks(environment: Environment) -> int:
    """Return how many tasks this process's srun has started; 0 without one, as in a batch script."""
    return int(environment.get("SLURM_STEP_NUM_TASKS", "0")) if "SLURM_PROCID" in environment else 0


def _refuse_mixtures(environment: Environment, launcher: str) -> None:
    tasks = _tasks(environment)
    if launcher == "alone" and int(environment.get("WORLD_SIZE", "1")) > 1:
        raise MachineError(f"WORLD_SIZE = {environment['WORLD_SIZE']} is set but RANK is not; {ANOTHER_WAY}")
    if launcher == "alone" and "PMI_RANK" in environment and int(environment.get("PMI_SIZE", "1")) > 1:
        raise MachineError(
            f"PMI_RANK = {environment['PMI_RANK']}: this launcher does not tell ranks of one machine apart; start with "
            "deepspeed, torchrun or srun"
        )
    if launcher == "alone" and "SLURM_JOB_ID" in environment and not tasks and _asked_for(environment) > 1:
        raise MachineError(
            f"this is the batch script of Slurm job {environment['SLURM_JOB_ID']} with {_asked_for(environment)} "
            "tasks, and a single process outside srun would leave all others idle; start it with srun (see "
            "slurm/train.sbatch), or ask for one task"
        )
    if launcher == "torchrun" and "," not in (per_node := environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        count = re.match(r"\d+", per_node)
        if count and int(count.group()) > 1:
            raise MachineError(
                f"srun started {count.group()} torchruns on each node (SLURM_STEP_TASKS_PER_NODE = {per_node}), and "
                "each starts all ranks of its node; use srun --ntasks-per-node=1, or srun without torchrun"
            )
    if launcher == "another" and tasks > 1 and environment["RANK"] != environment["SLURM_PROCID"]:
        raise MachineError(
            f"RANK = {environment['RANK']} was set before srun started this task, whose SLURM_PROCID is "
            f"{environment['SLURM_PROCID']}; unset RANK, WORLD_SIZE and LOCAL_RANK in the job's environment"
        )


def _asked_for(environment: Environment) -> int:
    return int(environment.get("SLURM_NTASKS", "1"))


def _take_from_slurm(environment: Environment) -> None:
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    here = _tasks_of(environment.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environment.get("SLURM_NODEID", "0")))
    if here:
        environment["LOCAL_WORLD_SIZE"] = str(here)
    environment.setdefault("MASTER_ADDR", first_host(_nodes(environment)) or "127.0.0.1")
    # The same number on every rank, another one for every step and every restart of a requeued job.
    count = int(environment.get("SLURM_JOB_ID", "0")) + 7 * int(environment.get("SLURM_RESTART_COUNT", "0"))
    count += 101 * int(environment.get("SLURM_STEP_ID", "0"))
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
    names = next(names for names in MPI if names[0] in environment)
    for name, theirs in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), names, strict=True):
        if theirs in environment:
            environment[name] = environment[theirs]
    alone = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"] == "1"
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", ANY_PORT)):
        if name not in environment and not alone:
            raise MachineError(
                f"started by mpirun ({names[0]} = {environment[names[0]]}), which does not say where the ranks meet; "
                f"give mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=PORT, or start with deepspeed, torchrun or srun"
            )
        environment.setdefault(name, value)


def _nodes(environment: Environment) -> str:
    return environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))


def _number(environment: Environment, name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise MachineError(f"{name} = {environment[name]!r} is no number; it is set by the launcher") from None
