"""Errors for lack of memory become one line with numbers and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaptive.training.batch import BatchSizes
from adaptive.training.prepared_run import Setup
from adaptive.training.supervision.causes import GIB, explained
from tests.helpers.device import DeviceRank
from tests.training.setups import config, train_here

WORDS = [
    "CUDA out of memory. Tried to allocate 2.00 GiB.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory",
]


@pytest.mark.parametrize("words", WORDS)
def test_whoever_lacks_memory_is_told_what_to_change(words: str) -> None:
    setup = Setup(config("unused", train={"global_batch": 64}), BatchSizes(64, 32, 1, 2), torch.device("cpu"))
    text = str(explained(RuntimeError(f"In a worker:\n{words}\n"), setup))
    assert text.startswith("out of memory on cpu (")
    remedies = "train.micro_batch=16 (now 32; the global batch stays), train.checkpointing=true, train.precision=bf16"
    assert f"try {remedies}, train.zero_stage=2 [{words}]" in text
    assert explained(RuntimeError("a size mismatch"), setup) is None


def test_a_remedy_is_a_micro_batch_that_would_train() -> None:
    """Not one image, which BatchNorm cannot take, and an even number where images are mixed."""
    for sizes, mixup, expected in (
        ((12, 6, 1, 2), 0.0, "train.micro_batch=3 "), ((12, 6, 1, 2), 0.2, "train.micro_batch=2 "),
        ((6, 3, 1, 2), 0.0, None), ((14, 7, 1, 2), 0.0, None), ((4, 2, 1, 2), 0.0, None),
    ):  # fmt: skip
        tree = config("unused", train={"global_batch": sizes[0]}, data={"mixup": mixup})
        text = str(explained(RuntimeError(WORDS[0]), Setup(tree, BatchSizes(*sizes), torch.device("cpu"))))
        assert ("train.micro_batch" in text) == (expected is not None), text
        assert expected is None or f"try {expected}" in text


def _short_of_memory(data: str, folder: str) -> tuple[str, str]:
    """Train with a quarter of a GiB, then with all there is, in the same process."""
    from adaptive.errors import MachineError

    def tree(name: str):
        train = {"global_batch": 1024, "epochs": 1, "max_steps": 1}
        return config(data, Path(folder) / name, data={"image_size": 96}, train=train)

    torch.cuda.set_per_process_memory_fraction(0.25 * GIB / torch.cuda.get_device_properties(0).total_memory)
    torch.cuda.empty_cache()
    try:
        train_here(tree("short"))
        said = "nothing"
    except MachineError as error:
        said = str(error)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return said, train_here(tree("enough"))


@pytest.mark.device
@pytest.mark.ranks
def test_a_gpu_without_memory_is_told_of_with_numbers(
    digits: Path, tmp_path: Path, device: torch.device, device_rank: DeviceRank
) -> None:
    if device.type == "cpu":
        pytest.skip("tests/chaos/test_trouble.py takes the memory of a run on the CPU")
    said, folder = device_rank(_short_of_memory, str(digits), str(tmp_path))
    assert said.startswith("out of memory on cuda:0 ("), said
    assert "GiB" in said
    assert "taken by this process at most); try train.micro_batch=512 (now 1024; the global batch stays)" in said
    assert "train.checkpointing=true, train.precision=bf16" in said
    assert (Path(folder) / "metrics.jsonl").is_file(), "the process goes on where there is enough"
