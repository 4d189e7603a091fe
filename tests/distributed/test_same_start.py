"""What ranks say to each other at their meeting, many of them, in threads that share a store."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from adaptive.distributed.same_start import Fact, check_same_start, digest_of, refuse_start
from adaptive.errors import StartError

SAME = {"optimizer.lr": Fact("0.1", "same file"), "the kind of device": Fact("cuda", "all on GPUs")}


def meet(everyones: list[dict[str, Fact]], worlds: list[int] | None = None) -> list[str]:
    """Return what each rank is told; two of them share a node."""
    store = HashStore()

    def one(rank: int) -> str:
        world = worlds[rank] if worlds else len(everyones)
        try:
            check_same_start(store, rank, world, f"node{rank // 2}", everyones[rank])
        except StartError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(everyones)) as pool:
        return list(pool.map(one, range(len(everyones))))


def test_equal_ranks_are_told_nothing() -> None:
    assert meet([SAME] * 16) == [""] * 16


def test_every_rank_hears_the_same_of_those_that_differ() -> None:
    other = {"optimizer.lr": Fact("0.5", "same file"), "the kind of device": Fact("cpu", "all on GPUs")}
    told = meet([SAME, SAME, SAME, other, other, SAME])
    (line,) = set(told)
    assert line == (
        "the ranks were started differently: optimizer.lr = 0.1 on node0 (rank 0), 0.5 on node1 (rank 3); also the "
        "kind of device = cuda and cpu; 1 more of the ranks differ, on node2; same file"
    )


def test_a_long_list_is_cut() -> None:
    ours = {f"key{i}": Fact("1", "r") for i in range(9)}
    theirs = {f"key{i}": Fact("2", "r") for i in range(9)}
    (line, _) = meet([ours, theirs])
    assert line.endswith("also key1 = 1 and 2, key2 = 1 and 2 and 6 more; r")


def test_long_values_are_shown_where_they_differ() -> None:
    ours, theirs = ({"data.path": Fact("/a" * 60 + f"/{end}/set", "r")} for end in ("one", "other"))
    (line, _) = meet([ours, theirs])
    assert re.search(r"data\.path = \.\.\.[/a]{19}one/set on .*, \.\.\.[/a]{19}other/set on ", line), line


def test_a_fact_that_one_rank_lacks_is_not_compared() -> None:
    assert meet([SAME, {"optimizer.lr": SAME["optimizer.lr"]}, {**SAME, "another": Fact("1", "")}]) == [""] * 3


def test_secrets_are_compared_by_their_digest() -> None:
    ours, theirs = (Fact("http://***@host/set", "one key", digest_of(f"http://{s}@host/set")) for s in ("a:b", "a:c"))
    told = meet([{"data.path": ours}, {"data.path": theirs}])
    assert all("data.path = http://***@host/set on node0 (rank 0), http://***@host/set on" in line for line in told)


def test_sums_may_be_rounded_differently_but_not_be_others() -> None:
    def weights(value: float) -> dict[str, Fact]:
        return {"weights": Fact(f"{value:.9g}", "same file", number=value)}

    assert meet([weights(1e6), weights(1e6 + 1e-3)]) == [""] * 2
    assert "weights = 1000000 on node0 (rank 0), 1000100 on" in meet([weights(1e6), weights(1e6 + 100)])[0]


@pytest.mark.parametrize("worlds", [[2, 3], [2, 1]])
def test_another_number_of_ranks(worlds: list[int]) -> None:
    told = meet([SAME, SAME], worlds)
    assert all(f"WORLD_SIZE = 2 on node0 (rank 0), {worlds[1]} on node0 (rank 1)" in line for line in told)


@pytest.mark.parametrize("refusing", [[0], [2], [0, 1, 2]])
def test_a_rank_that_cannot_start_is_heard_by_all(refusing: list[int]) -> None:
    store = HashStore()

    def one(rank: int) -> str:
        if rank in refusing:
            refuse_start(store, rank, 3, f"node{rank}", "data.path = 'x' does not exist")
            return ""
        with pytest.raises(StartError) as caught:
            check_same_start(store, rank, 3, f"node{rank}", SAME)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        told = list(pool.map(one, range(3)))
    others = f" (and {len(refusing) - 1} more of the ranks)" if len(refusing) > 1 else ""
    line = f"rank {refusing[0]} on node{refusing[0]} cannot start{others}: data.path = 'x' does not exist"
    assert told == ["" if rank in refusing else line for rank in range(3)]
