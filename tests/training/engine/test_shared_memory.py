"""A run leaves nothing behind in the machine's memory, however it ends."""

import os
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.ranks


def _use() -> tuple[bool, list[str], float]:
    os.environ["LOCAL_SIZE"] = "2"  # as the deepspeed launcher says; without it there is no such buffer
    import deepspeed.comm

    from adaptive.training.engine.group import init_distributed

    init_distributed(60)
    deepspeed.comm.barrier()
    mine = f"_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}_"
    left = [path.name for path in Path("/dev/shm").glob("deepspeed_*") if mine in path.name]
    mapped = mine in Path("/proc/self/maps").read_text()
    value = torch.full((4096,), 1.0 + int(os.environ["RANK"]))
    deepspeed.comm.inference_all_reduce(value)  # DeepSpeed's own exchange by shared memory
    return mapped, left, float(value.sum())


def test_no_buffer_of_deepspeeds_keeps_its_name() -> None:
    assert run_ranks(_use, 2) == [(True, [], 12288.0)] * 2
