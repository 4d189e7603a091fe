"""What is said of a promise and of what the runner took, and what both are made of."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from adaptive.errors import DataError
from adaptive.inference.calibration.calibrate import Target, fit
from adaptive.inference.measuring.promises import Bench, TimedRunner, Verdict, in_turn, probe, template, verify
from adaptive.inference.measuring.time_model import middle
from adaptive.inference.runner import DynamicClassifier
from tests.inference.conftest import build
from tests.inference.measuring.test_time_model import conditions

GOOD = Verdict(
    promised=3.5, again=3.5, measured=3.54, full=6.0, ratio=3.54 / 3.5, repeats=0.021, images=512, shares=[0.5, 0.5]
)


def said(**changes: float) -> str:
    found = replace(GOOD, **changes)  # type: ignore[arg-type]
    return "\n".join(replace(found, ratio=found.measured / found.promised).lines(conditions()))


def test_a_kept_promise_is_two_lines() -> None:
    assert said() == (
        "promised 3.5 ms an image (this machine repeats to 2.1 %), measured 3.54 on 512 images: 1.011 of it; 6 if "
        "nobody leaves\non m: torch, fp32, cpu, batch 16, 1 thread"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"repeats": 0.08}, "too noisy to promise tighter than 8.0 %"),
        ({"measured": 4.0}, "measured is 14.3 % above promised: the budget is not kept here"),
        ({"measured": 3.0}, "measured is 14.3 % below promised: the policy leaves some of the budget over"),
        ({"measured": 3.8, "repeats": 0.09}, "no more than this machine differs from itself"),
        ({"measured": 4.0, "again": 4.0}, "the second probe agrees with the runner"),
    ],
)
def test_a_difference_is_told_with_what_it_means(changes: dict[str, float], words: str) -> None:
    assert words in said(**changes)


def test_a_policy_is_held_against_the_runner(digit_images: torch.Tensor) -> None:
    """The real thing once, for what it counts; how long anything takes is no matter here."""
    network = build("resnet")
    bench = Bench.of(network, "torch", "fp32", 4, 1)
    kind = template("confidence", 3, temperature=True)
    runner = bench.runner(kind)
    models = probe(bench, runner, kind, digit_images[:8], 4)
    assert len(models) == 4
    assert all(model.conditions == bench.conditions for model in models)
    with torch.no_grad():
        logits = torch.stack(network(digit_images))
    model = middle(models)
    budget = model.exits[0] + 0.6 * (model.exits[-1] - model.exits[0])
    if not model.exits[0] < budget < model.exits[-1]:
        pytest.skip("this machine takes longer for less")
    policy = fit(logits, logits[-1].argmax(1), model, Target(budget=budget))
    found = verify(bench, runner, policy, models, digit_images[:8], digit_images[8:], 4)
    assert found.ratio == pytest.approx(found.measured / found.promised)
    assert min(found.promised, found.again, found.measured, found.full) > 0
    assert found.images == 32
    assert sum(found.shares) == pytest.approx(1)
    assert found.document(bench.conditions)["conditions"]["batch"] == 4


def test_even_and_odd_rounds_answer_the_same_images() -> None:
    seen: list[list[float]] = []

    class Answers:
        def run(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
            seen.append(images[:, 0, 0, 0].tolist())
            return None, torch.ones(len(images), dtype=torch.int64)

    images = torch.arange(400.0).reshape(400, 1, 1, 1)
    timed = TimedRunner(cast("Any", Answers()), images, 1, 3)
    timed.warm_up()
    seen.clear()
    for _ in range(4):
        timed.round()
    calls = len(seen) // 4
    rounds = [seen[i * calls : (i + 1) * calls] for i in range(4)]
    assert rounds[0] == rounds[1]
    assert rounds[2] == rounds[3]
    assert not {str(call) for call in rounds[0]} & {str(call) for call in rounds[2]}, "other images, round by round"
    assert timed.images == 2 * calls
    assert timed.shares == [1, 0, 0]


def test_runners_are_timed_in_pieces_in_turn() -> None:
    seen: list[str] = []

    class Answers:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, images: torch.Tensor) -> tuple[None, torch.Tensor]:
            seen.append(self.name)
            return None, torch.ones(len(images), dtype=torch.int64)

    pair = [TimedRunner(cast("Any", Answers(name)), torch.zeros(64, 1), 16, 3) for name in "ab"]
    for number, order in ((0, "ba"), (1, "ab")):
        pieces = in_turn(pair, number)
        for piece in pieces[:-1]:
            piece()
        assert [len(one.rounds) for one in pair].count(number) == 1, "one has a batch left"
        pieces[-1]()
        assert "".join(seen) == 4 * order
        assert [len(one.rounds) for one in pair] == [number + 1] * 2
        seen.clear()


def test_nothing_is_left_to_be_compiled_in_a_round_that_counts() -> None:
    policy = template("confidence", 3)
    runner = DynamicClassifier(build("resnet"), policy, "fp32", accelerate=lambda run, _: run, batch_sizes=(1, 2, 4))
    TimedRunner(runner, torch.zeros(4, 3, 32, 32), 4, 3).warm_up()
    assert runner.prepared > 0
    assert runner.warm_up().prepared == 0


def test_no_images_are_refused() -> None:
    runner = Bench.of(build("resnet"), "torch", "fp32", 4).runner(template("confidence", 3))
    with pytest.raises(DataError, match="no images to time a runner on"):
        TimedRunner(runner, torch.zeros(0, 3, 32, 32), 4, 3)
