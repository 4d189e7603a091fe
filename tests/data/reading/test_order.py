import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptive.data.reading import schedule
from adaptive.data.reading.order import (
    accumulation_steps,
    epoch_order,
    evaluation_batches,
    locate,
    rank_batches,
    steps_per_epoch,
)
from adaptive.errors import ConfigError, DataError

counts_lists = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(counts=counts_lists, seed=st.integers(0, 2**31), epoch=st.integers(0, 500), window=st.integers(1, 15))
def test_order_covers_every_sample_once(counts, seed, epoch, window):
    order = epoch_order(counts, seed, epoch, window)
    assert np.array_equal(np.sort(order), np.arange(sum(counts)))
    assert np.array_equal(order, epoch_order(counts, seed, epoch, window))


@given(counts=counts_lists, window=st.integers(1, 15))
def test_order_stays_inside_windows_of_shards(counts, window):
    order = epoch_order(counts, 7, 3, window)
    shards, _ = locate(order, counts)
    seen, start = set(), 0
    while start < len(order):
        # A window holds at most `window` shards and all of their samples.
        stop = start
        inside: set[int] = set()
        while stop < len(order) and (shards[stop] in inside or len(inside) < window):
            inside.add(int(shards[stop]))
            stop += 1
        size = sum(counts[shard] for shard in inside)
        assert stop - start == size or len(inside) < window
        assert not inside & seen
        seen |= inside
        start = stop
    assert seen == set(range(len(counts)))


def test_epochs_and_seeds_differ_and_shards_are_permuted():
    counts = [50] * 8
    orders = [epoch_order(counts, seed, epoch, 2) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == len(orders)
    first_shards = [tuple(locate(order[:100], counts)[0]) for order in orders]
    assert len({frozenset(shards) for shards in first_shards}) > 1


@given(seed=st.integers(0, 1000), micro=st.integers(1, 4), start=st.integers(0, 3))
def test_global_batches_do_not_depend_on_ranks_or_accumulation(seed, micro, start):
    global_batch = 24 * micro  # divisible by micro * world for every world below
    order = epoch_order([101, 7, 300, 92], seed, 0, 2)
    steps = len(order) // global_batch
    for world in (1, 2, 3, 4, 8):
        shares = [rank_batches(order, global_batch, micro, rank, world, min(start, steps)) for rank in range(world)]
        accumulation = global_batch // (micro * world)
        assert all(share.shape == ((steps - min(start, steps)) * accumulation, micro) for share in shares)
        # slots [(m * world + r) * micro, + micro): stacking ranks behind micro batches restores the order
        joined = np.stack(shares, axis=1).reshape(-1)
        assert np.array_equal(joined, order[min(start, steps) * global_batch : steps * global_batch])


@given(total=st.integers(1, 400), batch=st.integers(1, 40), world=st.integers(1, 8))
def test_evaluation_takes_every_sample_once_with_equal_rounds(total, batch, world):
    parts = [evaluation_batches(total, batch, rank, world) for rank in range(world)]
    assert len({part.shape for part in parts}) == 1
    ids = np.concatenate([part.reshape(-1) for part in parts])
    assert np.array_equal(np.sort(ids[ids >= 0]), np.arange(total))
    assert parts[0].shape[0] == -(-total // (batch * world))


def test_locate_inverts_ids_and_refuses_those_beyond():
    counts = [3, 0, 5]
    shards, positions = locate(np.arange(8), counts)
    assert shards.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        locate(np.array([8]), counts)


def test_errors_name_the_numbers():
    with pytest.raises(DataError, match=r"global_batch = 512 .* 100 images"):
        steps_per_epoch(100, 512)
    with pytest.raises(ConfigError, match=r"global_batch = 64 .* 16 x 3"):
        accumulation_steps(64, 16, 3)
    assert steps_per_epoch(100, 32) == 3


def test_the_shards_that_a_batch_needs_are_those_it_reads():
    counts = [30, 7, 50, 21, 40, 13]
    for window in (1, 2, 4, 9):
        train = schedule.TrainSchedule(counts, 3, window, 24, 4, 1, 2, 3)
        for number in (0, 1, 5, 19, 20, 21, 37):
            epoch, ids = train.batch(number)
            first, end = train.needs(number)
            assert epoch * 6 <= first < end <= epoch * 6 + 6
            assert set(locate(ids, counts)[0].tolist()) <= {train.shard(place) for place in range(first, end)}
            assert end - first <= 2 * window + 1 or window == 1
    evaluation = schedule.EvaluationSchedule(counts, evaluation_batches(161, 16, 1, 2))
    for number, ids in enumerate(evaluation.ids):
        shards = set(locate(ids[ids >= 0], counts)[0].tolist()) if (ids >= 0).any() else set()
        assert shards == set(range(*evaluation.needs(number)))
