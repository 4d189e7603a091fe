"""BatchNorm over all ranks (`model.sync_batchnorm`): on GPUs alone, with the statistics of the whole batch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from adaptive.distributed.ranks import Ranks
from adaptive.errors import ConfigError
from adaptive.networks.network import AdaptiveNetwork
from tests.helpers.device import DeviceRank, deterministically, prepare_cuda
from tests.training.setups import config, train_here

CLASSES, BATCH = 4, 8


def build() -> AdaptiveNetwork:
    from adaptive.networks.create import create_model

    torch.manual_seed(0)
    return create_model("test_resnet", num_classes=CLASSES, exits=3, input_size=32)


def images() -> Tensor:
    return torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.device
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_refused(digits: Path, tmp_path: Path) -> None:
    from adaptive.training.run import prepare

    tree = config(digits, tmp_path / "run", model={"sync_batchnorm": True}, train={"device": "auto"})
    with pytest.raises(ConfigError, match=r"model\.sync_batchnorm = true needs a GPU, and this machine has none"):
        prepare(tree, Ranks())
    with pytest.raises(
        ConfigError, match=r"model\.sync_batchnorm = true needs a GPU; set it to false with train\.device"
    ):
        config(digits, model={"sync_batchnorm": True}, train={"device": "cpu"})


def _trained(data: str, folder: str) -> list[list[float]]:
    """Losses with and without it; alone, a rank's statistics are those of the whole batch."""
    from tests.training.test_trainer import records

    losses = []
    for name, synchronised in (("own", False), ("shared", True)):
        tree = config(
            data, Path(folder) / name, model={"sync_batchnorm": synchronised}, train={"max_steps": 4},
            tracking={"every_steps": 1},
        )  # fmt: skip
        train_here(tree)
        losses.append([r["train/loss"] for r in records(Path(folder) / name) if "train/loss" in r])
    return losses


@pytest.mark.device
@pytest.mark.ranks
def test_a_rank_alone_trains_as_with_its_own_statistics(
    digits: Path, tmp_path: Path, device: torch.device, device_rank: DeviceRank
) -> None:
    if device.type == "cpu":
        pytest.skip("SyncBatchNorm computes on GPUs alone")
    own, shared = device_rank(deterministically, _trained, str(digits), str(tmp_path))
    assert len(own) == 4
    assert shared == pytest.approx(own, rel=1e-4)


def _half(rank: int, folder: str) -> None:
    """Forward and backward of one rank's half of the batch; both share the GPU, so they meet over gloo."""
    from adaptive.training.learner import arrange

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    prepare_cuda()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    tree = config("unused", model={"sync_batchnorm": True}, train={"device": "cuda"})
    network = arrange(build(), tree, device).train()
    own = images()[rank * BATCH // 2 : (rank + 1) * BATCH // 2].to(device)
    logits = network(own)
    sum(z.square().sum() for z in logits).backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        dist.all_reduce(parameter.grad)
        gradients[name] = parameter.grad.cpu()
    found = {
        "logits": [z.detach().cpu() for z in logits],
        "gradients": gradients,
        "buffers": {name: buffer.cpu() for name, buffer in network.named_buffers()},
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo may abort in its destructors


@pytest.mark.device
@pytest.mark.ranks
def test_two_ranks_have_the_statistics_of_the_whole_batch(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("SyncBatchNorm computes on GPUs alone")
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.get_context("spawn")
        processes = [context.Process(target=_half, args=(rank, folder), daemon=True) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
            alive = process.is_alive()
            process.kill()
            assert not alive, "a rank did not end within two minutes"
        assert [process.exitcode for process in processes] == [0, 0]
        halves = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2)]
    whole = build().to(device).train()
    logits = whole(images().to(device))
    sum(z.square().sum() for z in logits).backward()
    for number, expected in enumerate(logits):
        found = torch.cat([half["logits"][number] for half in halves])
        torch.testing.assert_close(found, expected.detach().cpu(), rtol=1e-3, atol=1e-3)
    for name, buffer in whole.named_buffers():
        for half in halves:
            torch.testing.assert_close(half["buffers"][name], buffer.cpu(), rtol=1e-4, atol=1e-5, msg=name)
    for name, parameter in whole.named_parameters():
        expected = parameter.grad.cpu()
        far = float((halves[0]["gradients"][name] - expected).norm() / expected.norm().clamp(min=1e-6))
        assert far < 1e-2, (name, far)  # a ReLU at its corner takes the other side now and then
