"""Predicted bytes against what DeepSpeed really holds on two ranks, kind by kind."""

from functools import cache
from typing import Any

import pytest
import torch

from adaptive.planning.memory import OptimizerBytes, Sizes, ZeroSettings, measure_optimizer, predict_memory
from adaptive.planning.plan import cost_phases
from tests.helpers.ranks import run_ranks
from tests.training.engines import SmallRun, chain_config, chain_network
from tests.training.setups import STAGES

BATCH = 8
# ZeRO 3 keeps parameters of up to so many elements whole; the test network has some on either side.
PERSISTENCE = 2_000


def tree_of(stage: int, **train: Any):
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": PERSISTENCE}} if stage == 3 else {}
    tree = chain_config({"zero_stage": stage, "global_batch": 2 * BATCH, **train}, deepspeed=zero)
    return tree.model_copy(update={"optimizer": tree.optimizer.model_copy(update={"lr": 1e-3, "momentum": 0.9})})


def predicted(stage: int, cuda: bool = False, **train: Any):
    tree = tree_of(stage, **train)
    settings = ZeroSettings.of(tree, 2, tree.train.global_batch // 2 // (tree.train.micro_batch or BATCH))
    return traced(cuda).memory(tree, settings, BATCH, cuda)


@cache
def traced(cuda: bool):
    """The trace, which stage, average and accumulation do not change; optimizer states are of every stage."""
    tree = tree_of(0)
    return cost_phases(tree, chain_network(True), ZeroSettings.of(tree, 2, 1), BATCH, 1, cuda)[0]


def bytes_of(tensors: Any) -> int:
    """Bytes of the storages, each counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if torch.is_tensor(t)}
    return sum(storages.values())


def _held_by_a_rank(stage: int) -> dict[str, int]:
    running = SmallRun(tree_of(stage))
    for step in range(2):
        running.applied_step(step)
    optimizer = running.engine.optimizer
    inner = optimizer if stage == 0 else optimizer.optimizer
    held = {"optimizer": bytes_of(v for state in inner.state.values() for v in state.values() if torch.is_tensor(v))}
    parameters, buffers = list(running.network.parameters()), list(running.network.buffers())
    if stage < 3:
        held["weights"] = bytes_of([*parameters, *buffers])
    else:
        held["weights"] = bytes_of([optimizer.lp_param_buffer, *buffers]) + bytes_of(
            p for p in parameters if p.ds_persist
        )
        held["gradients"] = bytes_of([optimizer.grad_partitions_flat_buffer])
    if stage in (1, 2):
        held["master weights"] = bytes_of(optimizer.single_partition_of_fp32_groups)
    if stage == 3:
        held["master weights"] = bytes_of(optimizer.fp32_partitioned_groups_flat)
        assert not {t.data_ptr() for t in optimizer.fp32_partitioned_groups_flat} & {
            t.data_ptr() for t in optimizer.fp16_partitioned_groups_flat
        }
    return held


@pytest.mark.ranks
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_hold_what_is_said(stage: int) -> None:
    held = run_ranks(_held_by_a_rank, 2, stage)[0]
    kinds = {moment.name: moment.kinds for moment in predicted(stage).moments}["validation"]
    assert {kind: kinds[kind] for kind in held} == held


def test_a_moving_average_and_accumulation_are_counted() -> None:
    plain, average = predicted(0), predicted(0, ema_decay=0.9)
    stored = Sizes.of(chain_network(True), tree_of(0).optimizer).stored
    assert average.peak.kinds["average"] == stored
    assert average.host["checkpoint (first rank)"] == plain.host["checkpoint (first rank)"] + stored
    first = predicted(0, global_batch=4 * BATCH, micro_batch=BATCH).moments[0]
    assert first.kinds["gradients"] == 4 * sum(p.numel() for p in chain_network(True).parameters())


def test_a_gpu_holds_whole_buckets_and_no_template() -> None:
    for stage, name in ((1, "forward and backward pass"), (2, "forward and backward pass"), (3, "backward pass")):
        on_gpu = {m.name: m for m in predicted(stage, cuda=True).moments}[name].kinds
        assert on_gpu["buckets"] == 4 * 500_000_000
        assert "template" not in on_gpu
    assert "template" in predicted(1, cuda=True).host
    assert predicted(1).peak.kinds.get("buckets", 0) < 4 * 10**6


def test_slices_are_padded_by_hand() -> None:
    sizes = Sizes(groups=((10, 7), (5,)), frozen=(9,), buffers=100)
    assert (sizes.learning, sizes.stored) == (22, 4 * 31 + 100)
    assert sizes.slices(ZeroSettings(0, 4, 1)) == [17, 5]
    assert sizes.slices(ZeroSettings(2, 4, 1)) == [24 // 4, 8 // 4]
    assert sizes.slices(ZeroSettings(3, 4, 1)) == [3 + 2, 2]


@pytest.mark.parametrize(("name", "copies"), [("sgd", 1), ("adamw", 2), ("lion", 1)])
def test_optimizer_states_are_counted(name: str, copies: int) -> None:
    tree, network = chain_config({}), chain_network(True)
    config = tree.optimizer.model_copy(update={"name": name, "momentum": 0.9})
    parameters = 4 * sum(p.numel() for p in network.parameters())
    found = measure_optimizer(network, config, ZeroSettings(0, 1, 1), cuda=False)
    assert found.state == pytest.approx(copies * parameters, rel=1e-3)
    half = measure_optimizer(network, config, ZeroSettings(2, 2, 1), cuda=False)
    assert half.state == pytest.approx(found.state / 2, rel=1e-2)


def test_more_images_take_more() -> None:
    tree = tree_of(0)
    settings = ZeroSettings.of(tree, 2, 1)
    phase = traced(cuda=False)
    optimizer = OptimizerBytes(0, 0)
    totals = [
        predict_memory(tree, settings, phase.sizes, phase.activations, optimizer, n, False).moments[0].total
        for n in (4, 8, 16, 64)
    ]
    assert totals == sorted(totals)
    kept = phase.activations.kept(64) - phase.activations.kept(16)
    assert totals[-1] - totals[-2] == pytest.approx(kept + 48 * (4 * 3 * 32 * 32 + 8), rel=0.05)


@pytest.mark.parametrize("prefix", ["", "stage3_"])
def test_a_size_counts_by_either_of_its_names(prefix: str) -> None:
    sizes = {f"{prefix}prefetch_bucket_size": 1234, f"{prefix}param_persistence_threshold": 56}
    settings = ZeroSettings.of(chain_config({"zero_stage": 3}, deepspeed={"zero_optimization": sizes}), 2, 1)
    assert (settings.prefetch_bucket, settings.persistence) == (1234, 56)
