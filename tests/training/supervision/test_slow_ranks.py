"""Who is slow: from the sums that ranks tell, and in real runs in which one of two ranks is slow for one reason."""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.tracking.record import read
from adaptive.training.supervision.own_time import OwnTime
from adaptive.training.supervision.peers import host_name
from adaptive.training.supervision.slow_ranks import RankSums, SlowRanks, Window
from tests.helpers.ranks import run_ranks
from tests.training.setups import config

DELAY = 0.25  # seconds
USUAL = {"compute": 0.1, "data": 0.01}


class Told:
    """Ranks that tell their sums, window by window of 20 steps in 10 seconds; two of them on a node."""

    def __init__(self, world: int) -> None:
        self.world, self.now = world, 0.0
        self.sums: list[dict[str, float]] = [{"steps": 5.0} for _ in range(world)]
        self.compared = SlowRanks(world)
        assert self.look() is None

    def look(self, **machines: Mapping[str, float]) -> Window | None:
        told = {rank: RankSums(f"node{rank // 2}", dict(sums)) for rank, sums in enumerate(self.sums)}
        return self.compared.look(told, machines, self.now)

    def window(self, others: Mapping[int, Mapping[str, float]], seconds: float = 0.3, **machines: Any) -> Window:
        self.now += 10
        for rank, sums in enumerate(self.sums):
            for name, value in {"steps": 1.0, "seconds": seconds, **USUAL, **others.get(rank, {})}.items():
                sums[name] = sums.get(name, 0.0) + 20 * value
        window = self.look(**machines)
        assert window is not None
        return window


def test_a_slow_rank_is_named_once_and_once_more_when_it_keeps_up() -> None:
    told = Told(6)
    assert told.window({}).lines == ()
    assert told.window({3: {"compute": 0.5}}).lines == ()  # once is nothing
    assert told.window({}).lines == ()
    assert told.window({3: {"compute": 0.5}}).lines == ()
    window = told.window({3: {"compute": 0.5}})
    [line] = window.lines
    assert line == (
        "warning: rank 3 on node1 is slow, and all ranks wait for it: 4.6 x the median rank's own time (compute 0.500 "
        "s a step, the median rank's is 0.100 s). It computes slowly; adaptive doctor, started on all nodes, compares "
        "their speed"
    )
    assert window.record() == {
        "ranks/slowest": 3, "ranks/slowest_node": "node1", "ranks/slowest_ratio": pytest.approx(4.636),
        "ranks/slowest_compute_seconds": pytest.approx(0.5), "ranks/median_compute_seconds": pytest.approx(0.1),
        "ranks/slowest_data_seconds": pytest.approx(0.01), "ranks/median_data_seconds": pytest.approx(0.01),
    }  # fmt: skip
    assert told.window({3: {"compute": 0.5}}).lines == ()  # told already
    assert told.window({3: {"compute": 0.15}}).lines == ()  # neither slow nor quite well
    assert told.window({3: {"compute": 0.15}}).lines == ()
    assert told.window({3: {"compute": 0.11}}).lines == ()
    assert told.window({}).lines == ("rank 3 on node1 keeps up again: 1.0 x the median rank's own time",)
    assert told.window({}).lines == ()


def test_an_even_run_and_a_difference_that_costs_nothing_name_nobody() -> None:
    told = Told(4)
    for number in range(6):
        jitter = {rank: {"compute": 0.1 * (1 + 0.1 * ((rank + number) % 4))} for rank in range(4)}
        assert told.window(jitter).lines == ()
    for _ in range(3):  # thrice as long as the others, of steps that take ten seconds
        assert told.window({2: {"compute": 0.4}}, seconds=10.0).lines == ()


def test_what_is_less_plain_takes_longer_to_be_told() -> None:
    told = Told(4)
    assert [bool(told.window({1: {"compute": 0.17}}).lines) for _ in range(5)] == [False, False, False, True, False]


def test_of_two_ranks_the_faster_one_is_the_measure() -> None:
    told = Told(2)
    told.window({0: {"compute": 0.3}})
    [line] = told.window({0: {"compute": 0.3}}).lines
    assert line.startswith("warning: rank 0 on node0 is slow, and all ranks wait for it: 2.8 x ")


def test_a_node_of_slow_ranks_is_one_line_with_what_it_knows_of_itself() -> None:
    told = Told(8)
    slow = {4: {"compute": 0.4}, 5: {"compute": 0.5}}
    machine = {"throttled_percent": 80.0, "swapped_mib_s": 12.34, "cpu_percent": 99.0}
    told.window(slow, node2=machine)
    [line] = told.window(slow, node2=machine).lines
    assert line.startswith("warning: rank 5 on node2 (and 1 more there) is slow")
    assert " Of node2 is known: its CPU quota is used up in 80 % of the periods, it swaps 12.3 MiB/s. " in line
    told.window({})
    [line] = told.window({}).lines
    assert line == "rank 4 on node2 (and 1 more there) keeps up again: 1.0 x the median rank's own time"


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("data", "It waits for its data; look at its disk and network, or raise data.workers"),
        ("records", "It is slow to write records; look at the file system of train.run_folder"),
        ("saving", "It waits for a checkpoint to be written; look at the disk of train.run_folder, or save less often"),
    ],
)
def test_the_cause_is_what_takes_longer_than_elsewhere(part: str, words: str) -> None:
    told = Told(4)
    told.window({0: {part: 0.3}})
    window = told.window({0: {part: 0.3}})
    assert f"({part} 0.300 s a step, the median rank's is " in window.lines[0]
    assert words in window.lines[0]
    assert window.record()[f"ranks/slowest_{part}_seconds"] == pytest.approx(0.3)


def test_a_rank_that_is_slow_at_everything_does_not_blame_its_disk() -> None:
    told = Told(2)
    told.window({0: {"data": 0.1}, 1: {"compute": 0.5, "data": 0.5}})
    assert "(compute 0.500 s a step" in told.window({0: {"data": 0.1}, 1: {"compute": 0.5, "data": 0.6}}).lines[0]


def test_a_rank_that_waits_for_data_and_wakes_slowly_does_not_blame_its_processor() -> None:
    told = Told(2)
    slow = {0: {"compute": 0.024, "data": 0.001}, 1: {"compute": 0.044, "data": 0.25}}
    told.window(slow)
    assert "(data 0.250 s a step, the median rank's is 0.001 s)" in told.window(slow).lines[0]


def test_nothing_is_compared_before_all_have_done_enough() -> None:
    compared = SlowRanks(2)
    first = {0: RankSums("a", {"steps": 5.0}), 1: RankSums("b", {"steps": 2.0})}
    assert compared.look({0: first[0]}, {}, 0.0) is None
    assert compared.look(first, {}, 0.0) is None
    begun = {rank: RankSums("a", {"steps": 5.0}) for rank in (0, 1)}
    assert compared.look(begun, {}, 1.0) is None
    few = {rank: RankSums("a", {"steps": 14.0, "compute": rank}) for rank in (0, 1)}
    assert compared.look(few, {}, 20.0) is None
    enough = {rank: RankSums("a", {"steps": 15.0, "compute": rank}) for rank in (0, 1)}
    assert not compared.due(10.9)
    assert compared.look(enough, {}, 10.9) is None
    assert compared.look(enough, {}, 20.0).rank == 1


def test_own_time_is_without_what_others_take() -> None:
    clock = OwnTime(torch.device("cpu"))
    for _ in range(2):
        with clock.computing():
            time.sleep(0.05)
            with clock.communicating():
                time.sleep(0.2)
        with clock.communicating():  # of the backward pass
            time.sleep(0.02)
        clock.add("data", 0.5)
        clock.step_done()
    assert clock.told["steps"] == 2
    assert clock.told["data"] == 1.0
    assert 0.1 <= clock.told["compute"] < 0.2
    assert clock.told["seconds"] >= 0.54


class Event:
    """A CUDA event whose work is done when the test says so, a second after the one before."""

    made: list["Event"]
    over = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = len(self.made)
        self.made.append(self)

    def query(self) -> bool:
        return self.at < Event.over

    def elapsed_time(self, later: "Event") -> float:
        return 1000.0 * (later.at - self.at)


def test_on_a_gpu_events_are_read_when_they_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", [], raising=False)
    monkeypatch.setattr(Event, "over", 0)
    clock = OwnTime(torch.device("cuda"))
    for _ in range(2):
        with clock.computing(), clock.communicating():
            pass
        clock.step_done()
    assert clock.told == {}
    monkeypatch.setattr(Event, "over", 7)  # the last event of the second step is still to come
    clock.step_done()
    assert (clock.told["steps"], clock.told["compute"]) == (1, 2.0)  # 3 s, without 1 s of communication
    sampled = OwnTime(torch.device("cuda"), sampled=True)
    for _ in range(8):
        with sampled.computing():
            pass
        sampled.step_done()
    assert len(Event.made) == 8 + 2


def train_with_a_slow_rank(tree: Any, kind: str, slow: int) -> list[str]:
    """Train as one of two ranks, of which one is slow for one reason and told soon; return what the user reads."""
    from adaptive.data.reading.stream import TrainStream
    from adaptive.distributed.ranks import find_ranks
    from adaptive.training import run
    from adaptive.training.callbacks.observers import ConsoleObserver, RecordObserver
    from adaptive.training.callbacks.rank_times import RankTimes
    from adaptive.training.checkpoints.saver import Saver
    from adaptive.training.supervision.peers import Peers

    run.RankTimes = functools.partial(RankTimes, window=0.5)
    lines: list[str] = []
    ConsoleObserver.on_message = lambda self, trainer, text: lines.append(text)
    run.Peers = functools.partial(Peers, interval=0.1)
    prepared = run.prepare(tree, find_ranks())
    if prepared.ranks.rank == slow:
        network = type(prepared.network)
        delayed = {
            "compute": (network, "forward", lambda self: self.training),
            "surgery": (network, "forward", lambda self: self.training),
            "validation": (network, "forward", lambda self: not self.training),
            "saving": (Saver, "_write", lambda self: True),
            "records": (RecordObserver, "on_values", lambda self: True),
        }
        _delay(*delayed[kind]) if kind in delayed else _delay_batches(TrainStream)
    run.train(prepared)
    return lines


def _delay(owner: Any, name: str, when: Callable[[Any], bool]) -> None:
    original = getattr(owner, name)

    def late(self: Any, *arguments: Any, **named: Any) -> Any:
        if when(self):
            time.sleep(DELAY)
        return original(self, *arguments, **named)

    setattr(owner, name, late)


def _delay_batches(stream: Any) -> None:
    original = stream.batches

    def late(self: Any, *arguments: Any) -> Iterator[Any]:
        for batch in original(self, *arguments):
            time.sleep(DELAY)
            yield batch

    stream.batches = late


@pytest.mark.ranks
@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "stage", "words"),
    [
        ("compute", 3, "compute"),
        ("surgery", 0, "compute"),
        ("data", 0, "data"),
        ("records", 0, "records"),
        ("saving", 0, "saving"),
        ("validation", 0, "compute"),
    ],
)
def test_why_a_rank_is_slow_is_told(kind: str, stage: int, words: str, digits: Path, tmp_path: Path) -> None:
    tree = config(
        digits, tmp_path / "run",
        train={"epochs": 40, "global_batch": 64, "max_steps": 100 if kind == "validation" else 60, "zero_stage": stage,
               "gradient_surgery": "pcgrad" if kind == "surgery" else "none"},
        evaluate={"every_epochs": 1 if kind == "validation" else 100, "batch": 10},
        checkpoint={"every_epochs": 100, "every_steps": 1 if kind == "saving" else 0, "asynchronous": False},
        tracking={"every_steps": 1 if kind == "records" else 10, "system_seconds": 0.1, "gradient_norms": False},
    )  # fmt: skip
    rank = 0 if kind in ("records", "saving") else 1
    told, _ = run_ranks(train_with_a_slow_rank, 2, tree, kind, rank)
    print(*told, sep="\n")
    of = "batch of validation" if kind == "validation" else "step"
    [line] = [line for line in told if "is slow" in line and f" s a {of}, the median rank's is " in line]
    assert f"rank {rank} on {host_name()} is slow, and all ranks wait for it: " in line
    assert f"own time ({words} 0." in line
    prefix = "ranks/validation" if kind == "validation" else "ranks"
    records = [one for one in read(tmp_path / "run" / "metrics.jsonl") if f"{prefix}/slowest" in one]
    assert records[-1][f"{prefix}/slowest"] == rank
    assert records[-1][f"{prefix}/slowest_ratio"] > 1.5
