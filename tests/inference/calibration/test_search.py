from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.errors import PolicyError
from adaptive.inference.calibration.geometric import GeometricCurve, geometric_shares, sweep
from adaptive.inference.calibration.search import cheapest, search
from adaptive.inference.calibration.search_moves import LeastCost, Problem
from adaptive.inference.calibration.thresholds import Choice, Scored, apply_thresholds
from adaptive.inference.policy import EVERYBODY, NOBODY
from tests.inference.answers import made_up


def _right(choice: Choice) -> int:
    return round(choice.outcome.top1 * len(choice.outcome.leaves) / 100)


def _all_policies(scored: Scored, costs: list[float]) -> list[tuple[int, float]]:
    """Right and mean cost of every set of thresholds that can differ, by walking through all of them."""
    tries = [sorted({NOBODY, *row.tolist()}) for row in scored.scores[:-1]]
    found = []
    for thresholds in itertools.product(*tries):
        right, cost = 0, 0.0
        for n in range(scored.scores.shape[1]):
            leave = next((i for i, t in enumerate(thresholds) if scored.scores[i, n] >= t), len(tries))
            right += bool(scored.correct[leave, n])
            cost += costs[leave]
        found.append((right, cost / scored.scores.shape[1]))
    return found


@st.composite
def _small(draw: st.DrawFn, exits: tuple[int, ...] = (2, 3)) -> tuple[Scored, list[float], float]:
    k = draw(st.sampled_from(exits))
    images = draw(st.integers(1, 9))
    levels = draw(st.sampled_from([2, 4, 1000]))  # few levels: nearly all tied
    scores = draw(st.lists(st.integers(0, levels), min_size=k * images, max_size=k * images))
    correct = draw(st.lists(st.booleans(), min_size=k * images, max_size=k * images))
    steps = draw(st.lists(st.floats(0.1, 3), min_size=k, max_size=k))
    costs = np.cumsum(steps).tolist()
    budget = costs[0] + draw(st.floats(0, 1)) * (costs[-1] - costs[0])
    values = torch.tensor(scores, dtype=torch.float32).view(k, images) / levels
    return Scored(values, torch.tensor(correct).view(k, images)), costs, min(budget, costs[-1])


@settings(deadline=None, max_examples=40)
@given(_small())
def test_small_problems_are_solved_exactly(problem: tuple[Scored, list[float], float]) -> None:
    scored, costs, budget = problem
    best = max(
        ((right, -cost) for right, cost in _all_policies(scored, costs) if cost <= budget * (1 + 1e-9)),
        key=lambda pair: (pair[0], round(pair[1], 9)),
    )
    found = search(scored, costs, [budget])[0]
    assert (_right(found), found.outcome.cost) == (best[0], pytest.approx(-best[1], rel=1e-6))


@settings(deadline=None, max_examples=10)
@given(_small(exits=(2,)), st.floats(1, 100))
def test_cheapest_is_exact_for_two_exits(problem: tuple[Scored, list[float], float], top1: float) -> None:
    scored, costs, _ = problem
    images = scored.scores.shape[1]
    able = [cost for right, cost in _all_policies(scored, costs) if 100 * right / images >= top1 * (1 - 1e-12)]
    if able:
        found = cheapest(scored, costs, top1)
        assert found.outcome.cost == pytest.approx(min(able), rel=1e-6)
        assert found.outcome.top1 >= top1 * (1 - 1e-12)
    else:
        with pytest.raises(PolicyError, match=r"top1 .*the best that thresholds reach"):
            cheapest(scored, costs, top1)


@pytest.mark.parametrize("seed", range(3))
def test_three_exits_and_200_images_are_exact(seed: int) -> None:
    scored, costs = made_up(3, 200, seed), [1.0, 2.5, 4.0]
    budgets = [1.3, 2.0, 3.1]
    tables = []  # of all pairs of thresholds, by comparing every image with every threshold
    leaves = [
        torch.cat([row[:, None] >= row[None], torch.zeros(200, 1, dtype=torch.bool)], 1) for row in scored.scores[:2]
    ]
    for values in (scored.correct.double(), torch.tensor(costs).double().unsqueeze(1).expand(3, 200)):
        first, second = leaves[0].double(), leaves[1].double()
        late = values[2].unsqueeze(1) + second * (values[1] - values[2]).unsqueeze(1)  # (N, thresholds of exit 2)
        tables.append((first.T @ values[0]).unsqueeze(1) + (1 - first).T @ late)
    for budget, found in zip(budgets, search(scored, costs, budgets), strict=True):
        allowed = tables[1] <= 200 * budget * (1 + 1e-9)
        most = tables[0][allowed].max()
        assert _right(found) == round(float(most))
        least = tables[1][allowed & (tables[0] > most - 0.5)].min() / 200
        assert found.outcome.cost == pytest.approx(float(least), rel=1e-9)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("exits", [3, 5])
def test_never_below_geometric_at_the_classic_costs_and_between(exits: int, smooth: bool) -> None:
    scored, costs = made_up(exits, 500, exits), [float(i + 1) for i in range(exits)]
    curve = GeometricCurve(scored, costs)
    rows = [row.expected.cost for row in curve.rows]
    budgets = [*rows, *np.linspace(1, exits, 11).tolist()]
    gains = []
    for budget, found in zip(budgets, search(scored, costs, budgets, smooth=smooth), strict=True):
        gains.append(found.outcome.top1 - curve.at(budget).outcome.top1)
        assert found.outcome.cost <= budget * (1 + 1e-8)
    assert min(gains) >= 0
    assert max(gains) > 0.5


def test_thresholds_lie_between_scores_and_say_what_happens() -> None:
    scored, costs = made_up(4, 300, 2), [1.0, 2.0, 3.0, 4.0]
    for found in search(scored, costs, [1.0, 1.7, 2.5, 4.0]):
        single = torch.tensor(found.thresholds)
        assert single.tolist() == found.thresholds
        assert found.thresholds[-1] == EVERYBODY
        assert not (scored.scores == single.unsqueeze(1)).any()
        again = apply_thresholds(single, scored, costs)
        assert (again.counts, again.top1, again.cost) == (
            found.outcome.counts,
            found.outcome.top1,
            found.outcome.cost,
        )
        # The last bit of a score moves nobody.
        nudged = Scored(torch.nextafter(scored.scores, torch.tensor(2.0)), scored.correct)
        assert apply_thresholds(single, nudged, costs).counts == found.outcome.counts
    assert search(scored, costs, [1.0])[0].thresholds[0] == EVERYBODY


def test_neighbouring_floats_take_the_leaving_one() -> None:
    low = torch.tensor(0.5)
    high = torch.nextafter(low, torch.tensor(1.0))
    scored = Scored(
        torch.stack([torch.stack([low, high]), torch.tensor([0.5, 0.5])]), torch.tensor([[False, True], [True, False]])
    )
    found = search(scored, [1.0, 2.0], [1.5])[0]
    assert found.thresholds[0] == float(high)
    assert found.outcome.counts == [1, 1]


def test_order_of_budgets_and_repeats_do_not_matter() -> None:
    scored, costs = made_up(4, 400, 3), [1.0, 2.0, 3.0, 4.0]
    up = search(scored, costs, [1.5, 2.0, 3.0])
    mixed = search(scored, costs, [3.0, 1.5, 2.0, 3.0])
    assert [c.thresholds for c in mixed] == [up[i].thresholds for i in (2, 0, 1, 2)]


def test_a_sample_of_many_images_starts_a_search_of_all() -> None:
    scored, costs = made_up(4, 9000, 1), [1.0, 2.0, 3.0, 4.0]
    budgets = [1.5, 2.5]
    for budget, found in zip(budgets, search(scored, costs, budgets), strict=True):
        geometric = GeometricCurve(scored, costs).at(budget)
        assert found.outcome.top1 > geometric.outcome.top1 + 0.2
        assert found.outcome.cost <= budget * (1 + 1e-8)


def test_smoothing_keeps_more_of_its_promise() -> None:
    pool, costs, budgets = made_up(5, 22_000, 7), [1.0, 2.0, 3.0, 4.0, 5.0], np.linspace(1.5, 4.5, 5).tolist()
    test, kept = pool.subset(torch.arange(6000, 22_000)), {}
    for smooth in (True, False):
        gains = []
        for draw in range(3):
            val = pool.subset(torch.arange(2000 * draw, 2000 * draw + 2000))
            curve = GeometricCurve(val, costs)
            for budget, found in zip(budgets, search(val, costs, budgets, smooth=smooth), strict=True):
                there = [
                    apply_thresholds(torch.tensor(c.thresholds), test, costs).top1 for c in (found, curve.at(budget))
                ]
                gains.append(there[0] - there[1])
        kept[smooth] = np.array(gains)
    assert kept[True].mean() > 0.05
    assert (kept[True] >= 0).mean() > 0.6
    assert (kept[True] >= 0).mean() >= (kept[False] >= 0).mean()


def test_geometric_calibration_is_a_row_or_just_within_the_budget() -> None:
    scored, costs = made_up(4, 1000, 4), [1.0, 2.0, 3.0, 4.0]
    rows = sweep(scored, costs)
    for row in rows[::7]:
        assert GeometricCurve(scored, costs).at(row.expected.cost).thresholds == row.thresholds.tolist()
    for budget in (1.001, 1.01, 1.9, 2.2, 3.0, 3.6, 3.99):
        assert budget * 0.995 < GeometricCurve(scored, costs).at(budget).outcome.cost <= budget
    assert GeometricCurve(scored, costs).at(1.0).outcome.counts == [1000, 0, 0, 0]
    assert GeometricCurve(scored, costs).at(4.0).outcome.counts == [0, 0, 0, 1000]
    assert GeometricCurve(scored, costs).at(4.0 * (1 + 1e-10)).outcome.cost == 4.0


def test_shares_of_a_huge_ratio_do_not_overflow() -> None:
    assert geometric_shares(1e9, 10).tolist()[-1] == 1.0
    assert bool(geometric_shares(1e9, 10).isfinite().all())


@pytest.mark.parametrize("function", [lambda s, c, b: search(s, c, [b]), lambda s, c, b: GeometricCurve(s, c).at(b)])
@pytest.mark.parametrize(
    ("costs", "budget", "message"),
    [
        ([1.0, 2.0, 3.0], 0.99, "budget 0.99: .* between 1 .* and 3"),
        ([1.0, 2.0, 3.0], 3.01, "budget 3.01"),
        ([1.0, 2.0, 3.0], float("nan"), "budget nan"),
        ([1.0, 1.0, 3.0], 2.0, "costs: 1, 1, 3: exit 2"),
        ([0.0, 1.0, 3.0], 2.0, "exit 1's has to be a finite number above 0"),
        ([1.0, 2.0, float("inf")], 2.0, "exit 3"),
        ([1.0, 2.0], 1.5, "costs: 2 for 3 exits"),
    ],
)
def test_wrong_costs_and_budgets(function, costs: list[float], budget: float, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        function(made_up(3, 20), costs, budget)


def test_one_exit_has_no_choice() -> None:
    found = search(made_up(1, 20), [2.0], [2.0])[0]
    assert found.thresholds == [EVERYBODY]
    assert found.outcome.counts == [20]


def test_the_example_of_a_pair_that_moves() -> None:
    """The example in the documentation of Problem's move of a pair."""
    scores = np.array([[0, 1, 2], [2, 1, 0], [0, 0, 0]], dtype=np.float32)
    right = np.array([[0, 0, 1], [1, 0, 1], [1, 1, 1]])
    problem = Problem(scores, right, np.array([1.0, 2.0, 4.0]))
    totals = [[int(problem.outcome(np.array([i, j]))[0]) for j in range(4)] for i in range(4)]
    assert totals == [[1, 1, 1, 1], [2, 2, 2, 2], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert problem.move_pairs(LeastCost(3), np.array([3, 3]), 0, 256, 3).tolist() == [2, 2]
