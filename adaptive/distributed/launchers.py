"""Which launcher started this process, where one may have been started by another.

mpirun starts its daemons with srun, srun starts torchruns, a job inherits what the shell of its submission was: the
variables of several launchers lie over each other. The innermost launcher counts, which knows of the processes that the
outer ones started. What cannot be told apart, or contradicts itself, is refused with the variables and the remedy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from adaptive.errors import MachineError

Environment = Mapping[str, str]

ANOTHER_WAY = "start with deepspeed, torchrun or srun, or unset it"
# How MPI's launchers number the processes: rank, ranks, and both on this machine. The first that are set count.
MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # hydra, of MPICH and Intel MPI
)
# Each of these starts all ranks of its node; the variable says how many of them work together.
PER_NODE = {"torchrun": "GROUP_WORLD_SIZE", "deepspeed": "CROSS_SIZE"}
JOIN = {
    "torchrun": "--nnodes {total} --rdzv-backend c10d --rdzv-endpoint HOST:29400",
    "deepspeed": "--hostfile HOSTS, once",
}


@dataclass(frozen=True)
class Outer:
    """What a launcher around another one has started: ``total`` processes, ``here`` of them on this node."""

    launcher: str
    total: int
    total_name: str
    here: int
    here_shown: str


def find_launcher(environment: Environment) -> str:
    """Return deepspeed, torchrun, srun, mpirun, or alone; "another" where only RANK is known."""
    if "TORCHELASTIC_RUN_ID" in environment:
        return "torchrun"
    if "RANK" in environment:
        return "deepspeed" if "CROSS_SIZE" in environment else "another"
    names, tasks = mpi_names(environment), slurm_tasks(environment)
    # Around several processes of mpirun's, srun's tasks are its daemons. Around one alone they are the ranks.
    if names and (_count(environment, names[1]) > 1 or tasks <= 1):
        return "mpirun"
    if tasks > 1:
        return "srun"
    return "alone"


def mpi_names(environment: Environment) -> tuple[str, str, str, str] | None:
    """Return the names by which an mpirun has numbered this process; Slurm's own PMI tells no local rank."""
    for names in MPI:
        if names[0] in environment and (names[2] in environment or names[0] != "PMI_RANK"):
            return names
    return None


def slurm_tasks(environment: Environment) -> int:
    """Return how many tasks this process's srun has started; 0 without one, as in a batch script."""
    return _count(environment, "SLURM_STEP_NUM_TASKS", 0) if "SLURM_PROCID" in environment else 0


def one_of_several(environment: Environment) -> bool:
    """Tell whether a launcher started this process as one of several; a batch script is not one of its tasks."""
    sizes = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", *(names[1] for names in MPI))
    return any(environment.get(name, "1") != "1" for name in sizes)


def started_by_mpirun(environment: Environment) -> bool:
    """Tell whether an mpirun is among the launchers: it gives its processes a terminal that nobody may look at."""
    return mpi_names(environment) is not None


def announced_rank(environment: Environment) -> int:
    """Return the rank that the launcher announces, for messages; 0 where it says nothing of use."""
    names = mpi_names(environment) if find_launcher(environment) == "mpirun" else None
    text = environment.get("RANK") or environment.get(names[0] if names else "SLURM_PROCID", "0")
    return int(text) if text.isdecimal() else 0


def refuse_mixtures(environment: Environment, launcher: str) -> None:
    """Refuse launchers that contradict each other (raises MachineError)."""
    tasks = slurm_tasks(environment)
    if launcher == "alone":
        _refuse_to_be_alone(environment, tasks)
    if launcher == "srun":
        _refuse_one_of_mpirun(environment, tasks)
    outer = _outer(environment, launcher)
    if outer is None:
        return
    if launcher == "another":
        _refuse_leftovers(environment, outer)
    elif "SLURM_PTY_PORT" not in environment or outer.launcher != "srun":  # of a terminal's step only one task lives
        _refuse_one_per_process(environment, launcher, outer)


def _outer(environment: Environment, launcher: str) -> Outer | None:
    """Return what the launcher around this one has started, where that is several processes."""
    names = mpi_names(environment)
    if names and launcher != "mpirun" and (total := _count(environment, names[1])) > 1:
        here = _count(environment, names[3])
        return Outer("mpirun", total, names[1], here, f"{names[3]} = {here}")
    if launcher != "srun" and (total := slurm_tasks(environment)) > 1:
        per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
        counts = [int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", per_node)]
        return Outer("srun", total, "SLURM_STEP_NUM_TASKS", max(counts, default=1), f"STEP_TASKS_PER_NODE = {per_node}")
    return None


def _refuse_to_be_alone(environment: Environment, tasks: int) -> None:
    if _count(environment, "WORLD_SIZE") > 1:
        raise MachineError(f"WORLD_SIZE = {environment['WORLD_SIZE']} is set but RANK is not; {ANOTHER_WAY}")
    if "PMI_RANK" in environment and _count(environment, "PMI_SIZE") > 1:
        raise MachineError(
            f"PMI_RANK = {environment['PMI_RANK']}: this launcher does not tell ranks of one machine apart; start with "
            "deepspeed, torchrun or srun"
        )
    asked = _count(environment, "SLURM_NTASKS")
    if "SLURM_JOB_ID" in environment and not tasks and asked > 1:
        raise MachineError(
            f"this is the batch script of Slurm job {environment['SLURM_JOB_ID']} with {asked} "
            "tasks, and a single process outside srun would leave all others idle; start it with srun (see "
            "slurm/train.sbatch), or ask for one task"
        )


def _refuse_one_of_mpirun(environment: Environment, tasks: int) -> None:
    """Refuse one process of mpirun's with a task of srun on every node: these may be mpirun's daemons, or the ranks."""
    names = mpi_names(environment)
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    if names and re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", per_node):
        raise MachineError(
            f"mpirun started one process ({names[1]} = 1) and srun {tasks} tasks (SLURM_STEP_NUM_TASKS = {tasks}), and "
            f"nothing tells which of them are the ranks; for srun's start env -u {names[0]} python ..., for mpirun's "
            "env -u SLURM_PROCID python ..."
        )


def _refuse_leftovers(environment: Environment, outer: Outer) -> None:
    """Refuse a RANK or WORLD_SIZE that was set before the launcher that counts started this process."""
    names = mpi_names(environment) if outer.launcher == "mpirun" else None
    number = names[0] if names else "SLURM_PROCID"
    for name, theirs in (("RANK", number), ("WORLD_SIZE", outer.total_name)):
        if name in environment and environment[name] != environment[theirs]:
            raise MachineError(
                f"{name} = {environment[name]} was set before {outer.launcher} started this task, whose {theirs} is "
                f"{environment[theirs]}; unset RANK, WORLD_SIZE and LOCAL_RANK in the job's environment"
            )


def _refuse_one_per_process(environment: Environment, launcher: str, outer: Outer) -> None:
    """Refuse launchers that start all ranks of a node where several are on a node, or do not know of each other."""
    if outer.here > 1:
        shown = f"SLURM_{outer.here_shown}" if outer.launcher == "srun" else outer.here_shown
        one = "srun --ntasks-per-node=1" if outer.launcher == "srun" else "mpirun --map-by ppr:1:node"
        raise MachineError(
            f"{outer.launcher} started {outer.here} {launcher}s on each node ({shown}), and each starts all ranks of "
            f"its node; use {one}, or {outer.launcher} without {launcher}"
        )
    name = PER_NODE.get(launcher, "")
    elastic = _count(environment, "TORCHELASTIC_MAX_RESTARTS", 0) > 0  # others may join, or have left
    if name in environment and _count(environment, name) == 1 and not elastic:
        raise MachineError(
            f"{outer.launcher} started {outer.total} {launcher}s ({outer.total_name} = {outer.total}), and none knows "
            f"of the others ({name} = 1); give {launcher} {JOIN[launcher].format(total=outer.total)}, or start one"
        )


def _count(environment: Environment, name: str, otherwise: int = 1) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else otherwise
