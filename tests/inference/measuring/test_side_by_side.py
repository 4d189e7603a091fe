"""Side by side: what is timed, how often, and what is said of it; with runners whose times are known."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptive.inference.intervals import wilson
from adaptive.inference.measuring.side_by_side import NOISE, Contender, Part, Row, batches, measure, of_round
from adaptive.inference.policy import EVERYBODY, Policy

CLASSES = 4


class Sleeps:
    """A runner that takes as long as it is told and answers an image's label, its first pixel; odd ones leave late."""

    policy = Policy(thresholds=[0.5, EVERYBODY])

    def __init__(self, *seconds: float) -> None:
        self.seconds = itertools.cycle(seconds)
        self.seen: list[list[int]] = []

    def run(self, images: Any, observe: Any = None) -> tuple[Tensor, Tensor]:
        numbers = images[:, 0, 0, 0].long()
        self.seen.append(numbers.tolist())
        time.sleep(next(self.seconds))
        return torch.eye(CLASSES)[numbers % CLASSES], 1 + numbers % 2

    def with_policy(self, policy: Policy, decide_everywhere: bool = False) -> Sleeps:
        return self


def contender(runner: Sleeps, images: int, part: Part = "policy", target: int = 0, wrong: int = 0) -> Contender:
    numbers = torch.arange(images)
    labels = (numbers % CLASSES).numpy()
    labels = np.where(numbers.numpy() < wrong, labels + 1, labels)
    shown = numbers.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Contender(target, f"t{target}", "torch", "fp32", part, runner, shown, labels, torch.device("cpu"))


@pytest.mark.parametrize(("images", "batch", "rounds"), [(24, 1, 5), (24, 8, 5), (25, 8, 2), (7, 1, 20)])
def test_every_image_is_timed_and_none_alone(images: int, batch: int, rounds: int) -> None:
    runner = Sleeps(0)
    [row] = measure([contender(runner, images)], batch, rounds)
    whole = images // batch * batch
    assert row.images == whole
    calls = runner.seen[whole // batch :]  # behind those that prepare
    assert all(len(call) == batch for call in calls)
    shown = Counter(number for call in calls for number in call)
    assert set(shown) == set(range(whole)), "all of them, at batch 1 as well"
    assert row.calls == 2 * sum(len(of_round(r, rounds, whole // batch)) for r in range(rounds))


def test_parts_of_the_rounds_cover_all_batches_evenly() -> None:
    for rounds, count in itertools.product((1, 3, 20), (1, 4, 20, 57)):
        times = Counter(number for r in range(rounds) for number in of_round(r, rounds, count))
        assert set(times) == set(range(count))
        assert max(times.values()) - min(times.values()) <= 1
        assert all(of_round(r, rounds, count) for r in range(rounds))


def test_too_few_images_are_repeated_to_fill_a_batch_and_counted_once() -> None:
    runner = Sleeps(0)
    [row] = measure([contender(runner, 3, wrong=1)], 8, 2)
    assert runner.seen[0] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert row.images == 3
    assert row.top1 == pytest.approx(200 / 3)
    assert [len(part) for part in batches(torch.zeros(17, 1), 8)] == [8, 8]


def test_accuracy_and_shares_are_of_the_images_that_were_timed() -> None:
    [row] = measure([contender(Sleeps(0), 21, wrong=5)], 4, 3)
    assert row.images == 20
    assert row.top1 == 75
    assert row.top1_interval == wilson(round(row.images * 0.75), row.images)
    assert row.shares == [0.5, 0.5]


def test_times_of_a_runner_that_takes_three_times_as_long() -> None:
    quick, slow = Sleeps(0.002), Sleeps(0.006)
    contenders = [contender(quick, 6), contender(slow, 6, "full"), contender(quick, 6, target=1)]
    first, full, other = measure(contenders, 2, 6)
    assert first.of_full is not None
    assert 0.25 < first.of_full.median < 0.55
    assert 1.8 < full.of_first.median < 4
    assert full.of_full is not None
    assert (full.of_full.median, first.of_first.median) == (1, 1)
    assert other.of_full is None, "another target's full network is not its own"
    assert first.p50 <= first.p95 <= first.p99
    assert first.milliseconds == pytest.approx(first.mean / 2)
    assert first.images_per_second == pytest.approx(1000 / first.milliseconds)


def test_rounds_are_shuffled_and_everything_comes_twice_in_each() -> None:
    told: list[int] = []

    class Tells(Sleeps):
        def __init__(self, name: int) -> None:
            super().__init__(0)
            self.name = name

        def run(self, images: Any, observe: Any = None) -> tuple[Tensor, Tensor]:
            told.append(self.name)
            return super().run(images)

    measure([contender(Tells(n), 1, target=n) for n in range(3)], 1, 12)
    rounds = [tuple(told[start : start + 12 : 2]) for start in range(3, len(told), 12)]  # a call before each turn
    assert all(Counter(one) == {0: 2, 1: 2, 2: 2} for one in rounds)
    assert len(set(rounds)) > 6


def test_what_differs_from_itself_is_noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = iter([1.0, 1.2] * 100)

    def timed(call: Any, device: Any) -> float:
        call()
        return next(halves) if call.func.__self__ is shaky else 1.0

    # A clock that is known: a real machine's noise cannot be ordered.
    monkeypatch.setattr("adaptive.inference.measuring.side_by_side.timed", timed)
    monkeypatch.setattr("random.Random.shuffle", lambda self, turns: None)
    shaky, steady = Sleeps(0), Sleeps(0)
    rows = measure([contender(shaky, 1), contender(steady, 1)], 1, 5)
    assert [row.noisy for row in rows] == [True, False]
    assert rows[0].repeats == pytest.approx(0.2)  # of the smaller one, whichever half that is
    assert rows[1].repeats == 0
    assert isinstance(rows[0], Row)
    assert NOISE == 0.05
