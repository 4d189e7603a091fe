"""Turns torch's errors for lack of memory and for a lost rank into one line with numbers and a remedy."""

from __future__ import annotations

import re
from collections.abc import Callable

import psutil
import torch

from adaptive.errors import MachineError, PeerError
from adaptive.passing_faults import passing, told
from adaptive.training.batch import ENOUGH, largest_micro_batch
from adaptive.training.prepared_run import Setup
from adaptive.training.supervision.peers import PEER_ENDED

GIB = 2**30
# How torch's allocators, the C library, and cuBLAS and cuDNN (for their workspaces) say that memory ran out.
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|STATUS_ALLOC_FAILED", re.IGNORECASE
)
# How gloo and NCCL say that a peer has gone.
PEER_GONE = re.compile(
    r"connection (closed|reset) by peer|connection refused|broken pipe|socket (timeout|closed)|timed out waiting"
    r"|NCCL error|ncclRemoteError|ncclSystemError|peer (is )?(closed|gone)",
    re.IGNORECASE,
)


def explained(error: BaseException, setup: Setup, account: Callable[[], str] = str) -> MachineError | None:
    """Return the error that a user can act on, or None where ``error`` is no lack of memory, lost or late rank.

    ``account`` is asked who has gone.
    """
    # A data worker's error comes with its traceback; what happened is the line that we look for, else the last one.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = next((line for line in lines if NO_MEMORY.search(line) or PEER_GONE.search(line)), lines[-1]).strip()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(text):
        return MachineError(
            f"out of memory on {setup.device} ({_numbers(setup.device)}); {_remedies(setup)} [{text[:200]}]"
        )
    if isinstance(error, torch.distributed.DistBackendError) or PEER_GONE.search(text):
        who = account() or "its own message, above or in its log, says why"
        return PeerError(
            f"{PEER_ENDED}; {who.rstrip('.')}. Started again, the run goes on from its newest checkpoint [{text[:200]}]"
        )
    return told(error) if passing(error) else None


def _numbers(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.max_memory_allocated(device)
        return f"{total / GIB:.1f} GiB, {free / GIB:.1f} free, {taken / GIB:.1f} taken by this process at most"
    memory = psutil.virtual_memory()
    own = psutil.Process().memory_info().rss
    return f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free, {own / GIB:.1f} taken by this process"


def _remedies(setup: Setup) -> str:
    """What lowers memory without changing the experiment, the most effective first."""
    train, batch = setup.config.train, setup.batch
    remedies = []
    smaller = largest_micro_batch(setup.config, batch.share, batch.micro_batch // 2) if batch.micro_batch > 1 else 0
    if smaller >= ENOUGH:
        remedies.append(f"train.micro_batch={smaller} (now {batch.micro_batch}; the global batch stays)")
    if not train.checkpointing and train.gradient_surgery == "none":
        remedies.append("train.checkpointing=true")
    if train.precision == "fp32":
        remedies.append("train.precision=bf16")
    if train.zero_stage < 2 and batch.world > 1:
        remedies.append("train.zero_stage=2")
    return "try " + ", ".join(remedies) if remedies else "a smaller data.image_size or network is needed"
