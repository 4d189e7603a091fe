"""Bytes per step, counted by hand, and against the collectives that two real ranks call."""

from typing import Any

import pytest

from adaptive.config.sections import Config
from adaptive.planning.memory import Sizes, ZeroSettings
from adaptive.planning.step_time import Hardware, collective_seconds, step_time
from adaptive.planning.traffic import Collective, bytes_sent, gathers_per_micro_batch, step_traffic
from tests.helpers.ranks import run_ranks
from tests.training.engines import chain_config

# Two groups; 1,000 and 200,001 elements lie on either side of ZeRO 3's threshold of 100,000.
SIZES = Sizes(groups=((200_001, 1_000), (10,)), frozen=(), buffers=0)
CONFIG = Config.model_validate({"model": {"backbone": "resnet18"}, "data": {"path": "x"}})
ALL = 4 * 201_011


def sent(stage: int, world: int = 4, accumulation: int = 1) -> float:
    return bytes_sent(step_traffic(CONFIG, ZeroSettings(stage, world, accumulation), SIZES), world)


def test_one_rank_sends_nothing() -> None:
    assert [sent(stage, world=1) for stage in range(4)] == [0, 0, 0, 0]


def test_a_ring_sends_each_byte_twice_in_an_all_reduce_and_once_in_a_gather() -> None:
    assert Collective("x", "all-reduce", 1000, 1).sent(4) == 2 * 750
    assert Collective("x", "all-gather", 1000, 1).sent(4) == 750
    assert Collective("x", "reduce-scatter", 1000, 1).sent(2) == 500


def test_stages_by_hand() -> None:
    assert sent(0) == pytest.approx(2 * 0.75 * ALL)
    # Each group is padded to a multiple of 2 elements per rank: 201,001 -> 201,008 and 10 -> 16.
    gathered = 0.75 * 4 * (201_008 + 16)
    assert sent(1) == pytest.approx(2 * 0.75 * ALL + gathered)
    assert sent(2) == pytest.approx(sent(1))
    # Stage 3 pads every parameter to a multiple of the ranks; small ones are gathered after the step alone.
    large, small = 4 * 200_004, 4 * (1_000 + 12)
    assert sent(3) == pytest.approx(0.75 * (large + (large + small) + small))


def test_accumulation_costs_stages_2_and_3_a_reduction_per_micro_batch() -> None:
    assert sent(0, accumulation=3) == sent(0)
    assert sent(1, accumulation=3) == sent(1)
    assert sent(2, accumulation=3) == pytest.approx(sent(2) + 2 * 2 * 0.75 * ALL)
    assert sent(3, accumulation=3) == pytest.approx(3 * sent(3) - 2 * 0.75 * 4 * 1_012)


def test_a_network_beyond_what_zero_3_keeps_is_gathered_twice() -> None:
    assert [gathers_per_micro_batch(n) for n in (10**9, 10**9 + 1)] == [1, 2]


def test_times_by_hand() -> None:
    node = Hardware(ranks_per_node=4, intra_bandwidth=100.0, inter_bandwidth=10.0, latency=10.0)
    whole = Collective("gradients", "all-reduce", 10**9, 1)
    assert collective_seconds(whole, 1, node) == 0
    assert collective_seconds(whole, 4, node) == pytest.approx(1.5e9 / 100e9 + 2 * 3 * 3e-6)
    # Two nodes: the link between them is the narrow one; one hop of 10 us and six of 3 us, twice.
    assert collective_seconds(whole, 8, node) == pytest.approx(1.75e9 / 10e9 + 2 * (10e-6 + 6 * 3e-6))
    # A thousand nodes: a tree of ten levels beats a ring's 2 x 999 hops for a small message.
    small = Collective("gradients", "all-reduce", 1000, 1)
    assert collective_seconds(small, 4096, node) == pytest.approx(2000 / 10e9 + 2 * (10 * 10e-6 + 3 * 3e-6))


def test_only_full_buckets_hide_behind_the_backward_pass() -> None:
    node = Hardware(ranks_per_node=1, inter_bandwidth=1.0, latency=0.0)
    whole = [Collective("gradients", "all-reduce", 4 * 10**8, 4)]
    settings = ZeroSettings(2, 2, 1, reduce_bucket=25 * 10**6)
    slow = step_time(whole, settings, 10**8, 10.0, node)
    assert slow.exposed == slow.communication == pytest.approx(0.4)
    hidden = step_time(whole, settings, 10**8, 10.0, node, overlap=True)
    assert hidden.exposed == pytest.approx(0.1)  # the last of four buckets
    short = step_time(whole, settings, 10**8, 0.3, node, overlap=True)
    assert short.exposed == pytest.approx(0.4 - 0.2)  # two thirds of the compute
    assert (slow.bound, short.bound) == ("compute", "communication")


def test_data_counts_where_it_takes_longer_than_all_else() -> None:
    node = Hardware(storage_bandwidth=1.0)
    found = step_time([], ZeroSettings(0, 1, 1), 1, 0.5, node, data_bytes=2e9)
    assert (found.total, found.bound) == (2.0, "data")


def _tree(stage: int, **train: Any) -> Config:
    """ZeRO 3 keeps parameters of up to 2,000 elements whole here, so that the network has some on either side."""
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 2_000}} if stage == 3 else {}
    return chain_config({"zero_stage": stage, **train}, deepspeed=zero)


def _collectives_of_a_rank(stage: int, accumulation: int) -> dict[str, int]:
    """Bytes of every kind of collective in the third step of two ranks, and what the plan says."""
    import deepspeed.comm.comm as comm

    from tests.training.engines import SmallRun

    tree = _tree(stage, micro_batch=8 // accumulation)
    # The rate is the tests' of single steps; here three have to stay finite.
    tree = tree.model_copy(update={"optimizer": tree.optimizer.model_copy(update={"lr": 1e-3})})
    running = SmallRun(tree)
    counted = {"all-reduce": 0, "all-gather": 0, "reduce-scatter": 0}
    # Of each call the argument that holds all ranks' parts; control messages of a few numbers are left out.
    whole = {
        "all_reduce": ("all-reduce", "tensor"),
        "all_gather_into_tensor": ("all-gather", "output_tensor"),
        "reduce_scatter_tensor": ("reduce-scatter", "input_tensor"),
    }

    def watch(name: str) -> None:
        original = getattr(comm.cdb, name)
        kind, key = whole[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = kwargs[key] if key in kwargs else args[0]
            size = tensor.numel() * tensor.element_size()
            counted[kind] += size if name != "all_reduce" or size > 64 else 0
            return original(*args, **kwargs)

        setattr(comm.cdb, name, call)

    for step in range(2):
        running.step(step)
    for name in whole:
        watch(name)
    assert running.step(2)
    return counted


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("stage", "accumulation"),
    [(0, 1), pytest.param(1, 2, marks=pytest.mark.full), (2, 2), pytest.param(3, 2, marks=pytest.mark.full)],
)
def test_two_ranks_send_what_is_said(stage: int, accumulation: int) -> None:
    from tests.training.engines import chain_network

    tree = _tree(stage)
    sizes = Sizes.of(chain_network(True), tree.optimizer)
    expected = {"all-reduce": 0, "all-gather": 0, "reduce-scatter": 0}
    for collective in step_traffic(tree, ZeroSettings.of(tree, 2, accumulation), sizes):
        expected[collective.kind] += collective.bytes
    counted = run_ranks(_collectives_of_a_rank, 2, stage, accumulation)[0]
    assert counted == expected
