import numpy as np
import pytest

from adaptive.errors import ConfigError
from adaptive.training.losses.exit_weights import StepWeights, drop_factors, resolve_exit_weights
from adaptive.training.phases import plan_phase
from tests.training.setups import config


def test_named_weights_have_mean_one() -> None:
    assert resolve_exit_weights(None, 3) == resolve_exit_weights("equal", 3) == [1.0, 1.0, 1.0]
    assert resolve_exit_weights("linear_up", 3) == [0.5, 1.0, 1.5]
    assert resolve_exit_weights("linear_down", 4) == [1.6, 1.2, 0.8, 0.4]
    assert resolve_exit_weights("linear_up", 1) == [1.0]
    assert resolve_exit_weights([2, 0], 2) == [2.0, 0.0]
    with pytest.raises(ConfigError, match="use equal, linear_up"):
        resolve_exit_weights("linear", 2)
    with pytest.raises(ConfigError, match="3 values for 2 exits"):
        resolve_exit_weights([1, 1, 1], 2)


def test_the_last_exit_alone_counts_first_and_only_the_step_decides() -> None:
    weights = StepWeights((0.5, 1.0, 1.5), last_only_until=7)
    assert weights(0) == weights(6) == [0.0, 0.0, 1.5]
    assert weights(7) == weights(1000) == [0.5, 1.0, 1.5]


def test_warm_up_and_dropping_follow_one_another() -> None:
    weights = StepWeights((1.0, 1.0), last_only_until=50, drop=0.5, seed=3)
    assert all(weights(step) == [0.0, 1.0] for step in range(50))
    assert {tuple(weights(step)) for step in range(50, 100)} == {(0.0, 1.0), (2.0, 1.0)}


def test_a_phase_counts_its_warm_up_from_its_own_first_step() -> None:
    tree = config(
        "x",
        train={"exit_weights": "linear_down", "last_only_epochs": 1.5, "exit_drop": 0.25, "seed": 4},
        phases=[{"epochs": 2}, {"epochs": 3, "exit_weights": "linear_up", "last_only_epochs": 0.5}],
    )
    first, second = (plan_phase(tree, phase, 3) for phase in tree.phases)
    assert first.weights_from(0, 10, 4) == StepWeights((1.5, 1.0, 0.5), 15, 0.25, 4)
    assert second.weights_from(20, 10, 4) == StepWeights((0.5, 1.0, 1.5), 25, 0.25, 4)


def test_a_backbone_phase_keeps_to_its_last_exit() -> None:
    tree = config("x", train={"exit_weights": "linear_up"}, phases=[{"epochs": 1, "learn": "backbone"}])
    assert plan_phase(tree, tree.phases[0], 3).exit_weights == [0.0, 0.0, 1.0]


def test_the_expected_factor_is_one_and_the_last_exit_always_counts() -> None:
    draws = np.array([drop_factors(4, 0.3, seed=1, step=step) for step in range(4000)])
    assert set(np.unique(draws[:, :3])) == {0.0, 1 / 0.7}
    assert (draws[:, 3] == 1).all()
    # The standard error of the mean is sqrt(0.3 / 0.7 / 4000), about 0.01.
    assert draws.mean(0) == pytest.approx([1, 1, 1, 1], abs=0.05)
    dropped = draws[:, :3] == 0
    assert abs(np.corrcoef(dropped.T) - np.eye(3)).max() < 0.08  # exits are drawn independently


def test_which_exits_drop_is_a_function_of_seed_and_step() -> None:
    assert drop_factors(5, 0.5, 7, 11) == drop_factors(5, 0.5, 7, 11)
    assert len({tuple(drop_factors(8, 0.5, seed, step)) for seed in range(4) for step in range(10)}) > 30


def test_without_early_exits_there_is_nothing_to_drop() -> None:
    assert drop_factors(1, 0.9, 0, 0) == [1.0]
