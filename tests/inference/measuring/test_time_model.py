"""The model of time: exact expectations, against batches that are drawn, and at the corners where they are known."""

import numpy as np
import pytest

from adaptive.inference.measuring.conditions import Conditions
from adaptive.inference.measuring.time_model import Asked, ExitTimes, TimeModel, grid, middle
from adaptive.inference.policy import NOBODY, Policy

SIZES = [1, 2, 4, 8, 12, 16]


def conditions(batch: int = 16, runtime: str = "torch") -> Conditions:
    return Conditions(machine="m", device="cpu", batch=batch, threads=1, precision="fp32", runtime=runtime)


def times(fixed: float, each: float, sizes: list[int]) -> list[float]:
    return [fixed + each * n for n in sizes]


def model(batch: int = 16, sizes: list[int] = SIZES, factor: float = 1.0, steps: bool = False) -> TimeModel:
    """Three exits whose blocks cost 2 ms and 1 ms an image, with every other part cheaper."""

    def part(fixed: float, each: float, sizes: list[int]) -> ExitTimes:
        return ExitTimes(
            sizes=sizes,
            block=times(fixed, each, sizes),
            exit=times(0.2, 0.05, sizes),
            decision=times(0.3, 0.01, sizes),
            ask=times(0.1, 0.001, sizes),
            pick=times(0.05, 0.1, sizes),
            drop=0.02,
        )

    first = [sizes[-1]]
    parts = [part(2 * factor, factor, first), part(1.5 * factor, 0.7 * factor, sizes), part(3, 1.2, sizes)]
    return TimeModel(conditions=conditions(batch), parts=parts, finish=0.4, steps=steps)


def at(part: ExitTimes, name: str, n: int, steps: bool = False) -> float:
    values = getattr(part, name)
    if steps:
        return next(value for size, value in zip(part.sizes, values, strict=True) if size >= n)
    return float(np.interp(n, part.sizes, values))


def drawn(found: TimeModel, shares: list[float], asked: Asked, batches: int) -> np.ndarray:
    """Milliseconds of batches of images that leave at random, part by part as a runner goes."""
    generator = np.random.default_rng(0)
    batch = found.conditions.batch
    spent = []
    for _ in range(batches):
        leaving = generator.multinomial(batch, shares)
        n, total = batch, found.finish
        for i, part in enumerate(found.parts):
            if n == 0:
                break
            names = ["block", *["exit"] * asked.computed[i], *["decision"] * asked.decides[i]]
            total += sum(at(part, name, n, found.steps) for name in names)
            if not asked.fires[i]:
                continue
            stay = n - leaving[i]
            total += at(part, "ask", n, found.steps)
            if i == len(found.parts) - 1:
                continue
            if stay == 0:
                total += part.drop
            elif stay < n:
                total += at(part, "pick", stay, found.steps)
            n = stay
        spent.append(total)
    return np.array(spent) / batch


@pytest.mark.parametrize("steps", [False, True], ids=["interpolated", "padded"])
@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [0.9, 0.08, 0.02], [0.0, 0.97, 0.03]])
def test_the_expectation_is_that_of_batches_drawn(shares: list[float], steps: bool) -> None:
    found, asked = model(steps=steps), Asked.everywhere(3)
    spent = drawn(found, shares, asked, 4000)
    assert found.mean(shares) == pytest.approx(spent.mean(), abs=4 * spent.std() / 4000**0.5 + 1e-12)


def test_an_exit_that_nobody_can_take_is_not_paid_for() -> None:
    policy = Policy(thresholds=[NOBODY, 0.5, 0.0])
    asked = Asked.of_policy(policy)
    assert asked == ([False, True, True], [False, True, True], [False, True, True])
    found, shares = model(), [0.0, 0.4, 0.6]
    spent = drawn(found, shares, asked, 4000)
    assert found.mean(shares, asked) == pytest.approx(spent.mean(), abs=4 * spent.std() / 4000**0.5)
    saved = (0.2 + 0.05 * 16 + 0.3 + 0.01 * 16 + 0.1 + 0.001 * 16) / 16
    assert found.mean(shares) - found.mean(shares, asked) == pytest.approx(saved)


@pytest.mark.parametrize(
    ("kind", "collaboration", "computed", "decides"),
    [("confidence", True, [True, True], [False, True]), ("patience", False, [True, True], [True, True])],
)
def test_exits_are_computed_for_those_behind_them(
    kind: str, collaboration: bool, computed: list[bool], decides: list[bool]
) -> None:
    asked = Asked.of_policy(Policy(kind=kind, thresholds=[NOBODY, 0.5, 0.0]), collaboration)
    assert asked.computed[:2] == computed
    assert asked.decides[:2] == decides
    assert asked.fires == [False, True, True]


def test_a_policy_that_never_fires_asks_nothing() -> None:
    asked = Asked.of_policy(Policy(kind="patience", thresholds=[NOBODY, NOBODY, 0.0]))
    assert asked.decides == [False, False, True]


def test_one_image_at_a_time_is_the_sum_over_the_blocks_it_sees() -> None:
    found = model(batch=1, sizes=[1])
    upto = [2 + 1, 1.5 + 0.7, 3 + 1.2]
    answer, ask = 0.2 + 0.05 + 0.3 + 0.01, 0.1 + 0.001
    first = upto[0] + answer + ask + 0.02 + 0.4
    second = upto[0] + upto[1] + 2 * (answer + ask) + 0.02 + 0.4
    third = sum(upto) + 3 * (answer + ask) + 0.4
    assert found.exits == pytest.approx([first, second, third])
    assert found.mean([0.5, 0.3, 0.2]) == pytest.approx(0.5 * first + 0.3 * second + 0.2 * third)


def test_everybody_at_one_exit_is_whole_batches_up_to_there() -> None:
    found = model()
    answer, ask = 0.2 + 0.05 * 16 + 0.3 + 0.01 * 16, 0.1 + 0.001 * 16
    blocks = [2 + 16, 1.5 + 0.7 * 16, 3 + 1.2 * 16]
    assert found.exits[0] == pytest.approx((blocks[0] + answer + ask + 0.02 + 0.4) / 16)
    assert found.exits[2] == pytest.approx((sum(blocks) + 3 * (answer + ask) + 0.4) / 16)


def test_a_batch_is_dearer_than_the_shares_of_full_batches() -> None:
    """What was promised once: at 16 images a tenth of a block costs much more than a tenth of its time."""
    found, shares = model(), [0.9, 0.08, 0.02]
    simple = float(np.dot(shares, found.exits))
    assert found.mean(shares) > 1.15 * simple


@pytest.mark.parametrize("shares", [[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.4, 0.6, 0.0]])
def test_prices_are_exact_where_they_are_taken_and_rise(shares: list[float]) -> None:
    found = model()
    prices = found.linearised(shares)
    assert float(np.dot(prices, shares)) == pytest.approx(found.mean(shares), rel=1e-9)
    assert prices[0] > 0
    assert prices == sorted(set(prices))


def test_prices_do_not_promise_what_is_cheaper_than_the_model() -> None:
    """Concave times lie below their tangent: a budget kept in prices is kept."""
    found, generator = model(), np.random.default_rng(1)
    prices = found.linearised([0.5, 0.3, 0.2])
    for shares in generator.dirichlet([1, 1, 1], 50).tolist():
        assert found.mean(shares) <= float(np.dot(prices, shares)) * (1 + 1e-3)


def test_padded_sizes_are_paid_for_in_full() -> None:
    found = model(steps=True)
    sixteen, twelve = found.resampled(range(1, 17)).parts[2].block[-1], found.resampled(range(1, 17)).parts[2].block[8]
    assert (twelve, sixteen) == (3 + 1.2 * 12, 3 + 1.2 * 16)  # nine images run at twelve


def test_the_middle_of_rounds_leaves_slow_ones_out() -> None:
    usual = [model(factor=1 + 0.01 * i) for i in range(4)]
    slow, fast = model(factor=9), model(sizes=[1, 3, 7, 16], factor=0.5)
    found = middle([slow, *usual, fast])
    assert found.mean([0.5, 0.3, 0.2]) == pytest.approx(middle(usual[:4]).mean([0.5, 0.3, 0.2]), rel=0.01)
    assert found.parts[1].sizes == grid(16)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rising"):
        ExitTimes(sizes=[2, 1], block=[1, 2])
    with pytest.raises(ValueError, match="exit: 1 times for 2 sizes"):
        ExitTimes(sizes=[1, 2], block=[1, 2], exit=[1])
    with pytest.raises(ValueError, match="up to 4 images of 16"):
        TimeModel(conditions=conditions(), parts=[ExitTimes(sizes=[4], block=[1])])


def test_a_file_brings_the_model_back() -> None:
    found = model()
    assert TimeModel.model_validate_json(found.model_dump_json()) == found
