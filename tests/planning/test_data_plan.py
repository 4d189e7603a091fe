"""The simulated epoch against the plan's own enumeration, rank by rank and reader by reader."""

import numpy as np
import pytest

from adaptive.config.sections import DataConfig
from adaptive.data.reading.order import epoch_order, locate, rank_batches
from adaptive.errors import DataError
from adaptive.planning.data_plan import Shards, resume_cost, simulate_epoch

COUNTS = (40, 13, 27, 55, 8, 31, 60, 19, 22, 45)
SHARDS = Shards(COUNTS, tuple(1000 * n for n in COUNTS))


def settings(workers: int, window: int = 3) -> DataConfig:
    return DataConfig(path="x", workers=workers, shuffle_window=window)


@pytest.mark.parametrize(("world", "micro", "workers"), [(1, 24, 0), (2, 6, 2), (4, 3, 3), (8, 3, 1), (24, 1, 2)])
def test_simulation_is_the_plan(world: int, micro: int, workers: int) -> None:
    data, seed, epoch = settings(workers), 5, 2
    found = simulate_epoch(SHARDS, data, seed, 24, micro, world, ranks_per_node=2, epoch=epoch)
    order = epoch_order(COUNTS, seed, epoch, data.shuffle_window)
    images, opens, readers = [], [], []
    nodes: dict[int, set[int]] = {}
    for rank in range(world):
        batches = rank_batches(order, 24, micro, rank, world)
        images.append(batches.size)
        shards = locate(batches.ravel(), COUNTS)[0]
        opens.append(len(set(shards.tolist())))
        nodes.setdefault(rank // 2, set()).update(shards.tolist())
        for worker in range(max(1, workers)):
            own = batches[worker :: max(1, workers)]
            readers.append(len(set(locate(own.ravel(), COUNTS)[0].tolist())))
    assert found.images_per_rank == (min(images), max(images))
    assert found.dropped == sum(COUNTS) - sum(images)
    assert found.opens == (min(opens), pytest.approx(np.mean(opens)), max(opens))
    assert found.opens_per_reader == (min(readers), max(readers))
    assert found.shards_per_node == (min(map(len, nodes.values())), max(map(len, nodes.values())))
    assert found.bytes_per_node == max(sum(1000 * COUNTS[s] for s in touched) for touched in nodes.values())


def test_ranks_share_an_epoch_evenly() -> None:
    found = simulate_epoch(Shards.assumed(10_000, 16, 100), settings(2), 0, 512, 8, 64, 8)
    assert (found.steps, found.images_per_rank, found.dropped) == (19, (152, 152), 10_000 - 19 * 512)


def test_assumed_shards_hold_every_image() -> None:
    shards = Shards.assumed(10, 4, 7)
    assert (shards.counts, shards.bytes, shards.images) == ((3, 3, 2, 2), (21, 21, 14, 14), 10)


def test_window_in_use_by_hand() -> None:
    # Equal shards of 10 images, 2 per window, fetched 1 ahead: a batch of 5 lies in one window; 3 shards at a time.
    shards = Shards.assumed(60, 6, 1)
    data = DataConfig(path="x", shuffle_window=2, cache_ahead=1)
    assert simulate_epoch(shards, data, 0, 5, 5, 1, 1).window_bytes == 30
    # A batch of 30 reaches over two windows: 4 shards, and 1 ahead.
    assert simulate_epoch(shards, data, 0, 30, 30, 1, 1).window_bytes == 50


def test_resuming_reads_nothing_again() -> None:
    shards = Shards.assumed(60, 6, 1)
    cost = resume_cost(shards, DataConfig(path="x", shuffle_window=2), 0, 5, share=0.5)
    assert (cost.step, cost.skipped) == (6, 30)
    # Step 6 takes images 30 to 34 of the order: the second window, shards 2 and 3 of it.
    assert (cost.shards_passed, cost.shards_reopened, cost.bytes_refetched) == (2, 2, 20)


def test_a_batch_beyond_the_dataset_is_refused() -> None:
    with pytest.raises(DataError, match=r"train.global_batch = 64 is more than the 60 images"):
        simulate_epoch(Shards.assumed(60, 6, 1), settings(0), 0, 64, 8, 8, 8)
