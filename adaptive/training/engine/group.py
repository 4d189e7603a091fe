"""The process group: device, start, collective operations, end."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive.errors import MachineError
from adaptive.training.engine.meeting import open_store
from adaptive.training.engine.operators import free_operators

LOGGER = logging.getLogger(__name__)

_meetings: list[str] = []  # prefixes of this process's: a server that lives on keeps the keys of the one before


def resolve_device(requested: str, local_rank: int = 0) -> torch.device:
    """Return the device of this rank, and make DeepSpeed take the same (raises MachineError without a GPU)."""
    if requested == "cuda" and not torch.cuda.is_available():
        raise MachineError("train.device = 'cuda', but this machine has no usable GPU; use train.device=cpu or auto")
    chosen = os.environ.get("DS_ACCELERATOR", "")
    if requested == "auto" and chosen == "cpu":
        return torch.device("cpu")
    if requested == "cpu" or not torch.cuda.is_available():
        if chosen not in ("", "cpu"):
            LOGGER.warning(
                "DS_ACCELERATOR = %r is not used: the run is on the CPU (train.device=%s)", chosen, requested
            )
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    if chosen not in ("", "cuda"):
        raise MachineError(
            f"DS_ACCELERATOR = {chosen!r} in the environment, but train.device = {requested!r} takes a GPU; unset it, "
            "or use train.device=cpu"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise MachineError(
            f"local rank {local_rank} has no GPU: this machine shows {count}; start at most {count} ranks"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def init_distributed(timeout_seconds: float = 1800.0, meet: Callable[[dist.Store], None] | None = None) -> None:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    A single rank meets nobody: whatever MASTER_PORT is, the system names one that is free.

    Args:
        timeout_seconds: after which a collective operation fails.
        meet: called on every one of several ranks with the store by which they met, before they form the group: what it
            raises ends the start before a backend could wait for ranks that have none.

    Raises:
        PassingError: the port is in use, or a rank did not come in time.
    """
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if dist.is_initialized():
        return
    free_operators()
    if os.environ["WORLD_SIZE"] == "1":
        _listen_alone(timedelta(seconds=timeout_seconds))
    store = None
    if meet is not None and os.environ["WORLD_SIZE"] != "1":
        store = _meeting(timeout_seconds)
        meet(store)
    with _without_good_news():
        deepspeed.init_distributed(timeout=timedelta(seconds=timeout_seconds), verbose=False, auto_mpi_discovery=False)
    barrier()
    del store  # the first rank's is the server, and had to live until the group had a connection of its own
    _forget_shared_memory()


def _meeting(timeout_seconds: float, silent: bool = False) -> dist.Store:
    """Return the store by which the ranks meet, as this process's next meeting sees it (raises PassingError)."""
    _meetings.append(f"adaptive/{len(_meetings)}")
    return open_store(timeout_seconds, _meetings[-1], silent)


def refuse_group(refuse: Callable[[dist.Store], None], timeout_seconds: float) -> None:
    """Meet the other ranks only to tell them that this one does not join; nothing where they have met already.

    It is no error if they cannot be reached: whoever calls has one to tell of.
    """
    if dist.is_initialized() or _meetings:
        return
    # RuntimeError is what torch raises where a store does not answer.
    with suppress(RuntimeError, MachineError):
        refuse(_meeting(timeout_seconds, silent=True))


@contextmanager
def _without_good_news() -> Iterator[None]:
    """Keep back what DeepSpeed prints at every start of an operator that it has found; all else is passed on."""
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            if not line.endswith("built successfully"):
                print(line, flush=True)


def _listen_alone(timeout: timedelta) -> None:
    """Form the group of one rank at a port that the system chooses: a port found free before may be taken by now."""
    from deepspeed.accelerator import get_accelerator

    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = dist.TCPStore(os.environ["MASTER_ADDR"], 0, 1, is_master=True, timeout=timeout)
    os.environ["MASTER_PORT"] = str(store.port)
    backend = get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _forget_shared_memory() -> None:
    """Take the name off the buffer (66 MiB) by which DeepSpeed's CPU ranks of one machine exchange data.

    All ranks have mapped it by now. DeepSpeed itself never removes it: every run would leave its own in memory until
    the machine is started anew.
    """
    suffix = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}_{dist.get_rank()}"
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{suffix}").unlink(missing_ok=True)


def all_reduce(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place; without a process group it is returned as it is."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in the order of the ranks; without a process group this one's alone."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first_rank(value: Any) -> Any:
    """Return the first rank's value on every rank; without a process group this one's."""
    values = [value]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def leave() -> None:
    """Leave the process group, at the end of a process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
