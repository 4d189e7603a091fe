"""The probe: runners do what scripts say, and a clock that is known brings back the model that it was made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from adaptive.inference.measuring.conditions import Conditions
from adaptive.inference.measuring.promises import Bench, template
from adaptive.inference.measuring.time_model import Asked, TimeModel, grid
from adaptive.inference.measuring.time_probe import (
    Clock,
    Contender,
    Scripted,
    batches_of,
    measure,
    promise,
    repeats,
    scripts,
)
from adaptive.inference.policy import Policy
from adaptive.inference.policy_kinds import KINDS, Kind
from adaptive.inference.runtimes import open_runner
from tests.inference.conftest import Exported
from tests.inference.measuring.test_time_model import at, model
from tests.inference.test_runtimes import KINDS as RUNTIMES
from tests.inference.test_runtimes import opened

CPU = torch.device("cpu")


def conditions(batch: int) -> Conditions:
    return Conditions(machine="m", device="cpu", batch=batch, threads=1, precision="fp32", runtime="torch")


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runs_keep_the_scripted_counts_and_the_answers(
    runtime: str, exported: Callable[[str], Exported], digit_images: torch.Tensor
) -> None:
    done = exported("resnet")
    scripted = Scripted.like(done.policy, [True] * 3, 40, CPU)
    runner = opened(runtime, done).with_policy(scripted)
    images = digit_images[:20] if runtime != "onnx" else digit_images[:20].numpy()
    with torch.no_grad():
        alone = torch.stack([done.policy.probabilities(i, z) for i, z in enumerate(done.network(digit_images[:20]))])
    for script in ([20, 9, 4, 0], [20, 20, 20, 0], [20, 1, 0, 0], [20, 0, 0, 0]):
        scripted.play(script, np.random.default_rng(0))
        clock = Clock(CPU, partial(next, count(step=0.001)))  # a millisecond at every look
        clock.start()
        probabilities, exits = map(torch.as_tensor, runner.run(images, clock))
        left = [int((exits == i + 1).sum()) for i in range(3)]
        assert left == [a - b for a, b in pairwise(script)]
        assert torch.allclose(probabilities, alone[exits.long() - 1, torch.arange(20)], atol=1e-4)
        spent = clock.spent()
        assert [part[-1] for part in spent] == pytest.approx([1] * len(spent))
        assert spent[-1][:3] == ("finish", max(i for i in range(3) if script[i]), 20)


def test_the_times_of_the_events_sum_to_the_run(exported: Callable[[str], Exported]) -> None:
    done, now = exported("resnet"), [0.0]
    clock = Clock(CPU, lambda: now[0])

    def later(part: str, i: int, samples: int) -> None:
        now[0] += 0.001 * (1 + i)
        clock(part, i, samples)

    clock.start()
    done_by = opened("torch", done).with_policy(Scripted.like(done.policy, [True] * 3, 8, CPU))
    done_by.policy.play([4, 2, 2, 0], np.random.default_rng(0))  # type: ignore[attr-defined]
    done_by.run(torch.zeros(4, 3, 32, 32), later)
    spent = clock.spent()
    assert sum(part[-1] for part in spent) == pytest.approx(1000 * now[0])
    assert [part[:3] for part in spent[3:5]] == [("compaction", 0, 2), ("block", 1, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_scripted_policy_scores_as_its_kind_does(kind: Kind) -> None:
    real, generator = template(kind, 3, temperature=True), torch.Generator().manual_seed(0)
    scripted = Scripted.like(real, [True, False, True], 6, CPU)
    assert [scripted.can_fire(i) for i in range(3)] == [True, False, True]
    assert scripted.needs_every_exit == real.needs_every_exit
    scripted.play([6, 2, 2, 0], np.random.default_rng(0))
    memory = None
    for i in range(3):
        values = torch.rand(6, 4, generator=generator).softmax(-1)
        found, expected = scripted.decide(i, values, memory), real.decide(i, values, memory)
        assert torch.equal(found.scores, expected.scores)
        memory = found.memory
        assert int(found.leaves.sum()) == [4, 4, 6][i] or i == 1


@pytest.mark.parametrize("batch", [1, 2, 16])
@pytest.mark.parametrize("opened_at", [[True, True, True, True], [False, True, False, True], [False] * 3 + [True]])
def test_scripts_show_every_block_at_every_size(opened_at: list[bool], batch: int) -> None:
    sizes = grid(batch)
    found = scripts(opened_at, sizes)
    for script in found:
        assert script[0] == batch
        assert script[-1] == 0
        assert script == sorted(script, reverse=True)
        assert all(fires or a == b for fires, a, b in zip(opened_at[:-1], script, script[1:-1], strict=False))
    first = opened_at.index(True)
    for i in range(4):
        seen = {script[i] for script in found} - {0}
        assert seen == (set(sizes) if i > first else {batch})
    for i, fires in enumerate(opened_at[:-1]):
        if fires:  # to every smaller size, to none, and nothing to be copied
            assert {script[i + 1] for script in found if script[i + 1] < script[i]} >= {0, *sizes[:-1]}
            assert any(script[i + 1] == script[i] for script in found)


class Made:
    """A runner whose parts take what a model says, on a clock that nothing else moves."""

    def __init__(self, of: TimeModel, policy: Scripted) -> None:
        self.of, self.policy, self.now = of, policy, 0.0

    def run(self, images: Any, observe: Any = None) -> None:
        here = total = len(images)
        for i, part in enumerate(self.of.parts):
            steps = [("block", "block"), ("exit", "exit"), ("decision", "decision")]
            for name, told in steps:
                self.spend(at(part, name, here), observe, told, i, here)
            leaves = int(self.policy.masks.numpy[i, :here].sum())
            stay = here - leaves
            more = 0.0 if stay == here or i == 2 else at(part, "pick", stay) if stay else part.drop
            self.spend(at(part, "ask", here) + more, observe, "compaction", i, stay)
            here = stay
            if not here:
                break
        self.spend(self.of.finish, observe, "finish", i, total)

    def spend(self, milliseconds: float, observe: Any, *event: Any) -> None:
        self.now += milliseconds / 1000
        if observe is not None:
            self.now += 1e-5  # what observing costs, and no model says
            observe(*event)


@pytest.mark.parametrize("batch", [1, 16])
def test_a_known_clock_brings_the_model_back(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of = model(batch, [1] if batch == 1 else [1, 2, 4, 8, 12, 16])
    scripted = Scripted.like(Policy(thresholds=[0.5, 0.5, 0.0]), [True] * 3, 32, CPU)
    made = Made(of, scripted)
    monkeypatch.setattr(Clock.__init__, "__defaults__", (lambda: made.now,))
    contender = Contender(made, scripted, Asked.everywhere(3), conditions(batch), CPU)
    calls: list[tuple[int, int, float]] = []

    def beside(number: int) -> list[Callable[[], object]]:
        return [lambda piece=piece: calls.append((number, piece, made.now)) for piece in range(3)]  # type: ignore[misc]

    [models] = measure([contender], np.zeros((40, 1)), batch, 4, beside=beside)
    assert [call[:2] for call in calls] == [(number, piece) for number in range(4) for piece in range(3)]
    assert len({now for *_, now in calls}) == 12, "between the runs, and not all at once"
    for shares in ([0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.1, 0.0, 0.9]):
        assert promise(models, shares) == pytest.approx(of.mean(shares), rel=1e-3)  # its tables are straight lines
        assert repeats(models, shares) < 1e-3


def test_what_does_not_repeat_is_told() -> None:
    models = [model(factor=factor) for factor in (1, 1.1, 1, 1.1)]
    assert 0.03 < repeats(models, [0.5, 0.3, 0.2]) < 0.1


def test_batches_go_round_and_fill_up() -> None:
    batches = batches_of(np.arange(5), 2)
    assert [next(batches).tolist() for _ in range(3)] == [[0, 1], [2, 3], [0, 1]]
    assert next(batches_of(torch.arange(3), 5)).tolist() == [0, 1, 2, 0, 1]


def test_a_bench_knows_what_its_times_hold_for(exported: Callable[[str], Exported]) -> None:
    network = exported("resnet").network
    bench = Bench.of(network, "onnx", "bf16", 8, 1)
    assert (bench.conditions.precision, bench.conditions.threads, bench.padded) == ("fp32", 1, ())
    assert Bench.of(network, "compile", "fp32", 12).padded == (1, 2, 4, 8, 12)
    assert isinstance(bench.images(torch.zeros(2, 3, 4, 4)), np.ndarray)
    assert open_runner(network, template("gate", 3)).policy.kind == "gate"
