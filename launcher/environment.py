"""Which launcher started this process, and where it stands among the ranks."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping

from adaptive.errors import MachineError
from adaptive.training.run import Ranks

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def find_ranks(environment: MutableMapping[str, str] | None = None) -> Ranks:
    """Read the ranks that deepspeed, torchrun or srun announce, completing the environment for the process group.

    Raises:
        MachineError: the environment names a rank, but not all that is needed to meet the others.
    """
    environment = os.environ if environment is None else environment
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        _take_from_slurm(environment)
    if "RANK" in environment:
        missing = [name for name in NEEDED if name not in environment]
        if missing:
            raise MachineError(
                f"RANK is set but {', '.join(missing)} not; start with deepspeed, torchrun or srun, or unset RANK"
            )
    else:
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", str(_free_port()))
    return Ranks(*(_number(environment, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))


def _take_from_slurm(environment: MutableMapping[str, str]) -> None:
    environment.setdefault("RANK", environment["SLURM_PROCID"])
    environment.setdefault("WORLD_SIZE", environment["SLURM_NTASKS"])
    environment.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", ""))
    environment.setdefault("MASTER_ADDR", first_host(nodes) or "127.0.0.1")
    # The same number on every rank, another one for every restart of a requeued job.
    job = int(environment.get("SLURM_JOB_ID", "0")) + 7 * int(environment.get("SLURM_RESTART_COUNT", "0"))
    environment.setdefault("MASTER_PORT", str(20000 + job % 20000))


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list such as ``gpu[003-005,7],cpu1``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    return (match.group(1) + (match.group(2) or "")) if match else ""


def _number(environment: MutableMapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise MachineError(f"{name} = {environment[name]!r} is no number; it is set by the launcher") from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
