import numpy as np
import pytest

from adaptive.training.losses.exit_weights import drop_factors


def test_the_expectation_is_one_and_the_last_exit_always_counts() -> None:
    draws = np.array([drop_factors(4, 0.3, seed=1, step=step) for step in range(4000)])
    assert set(np.unique(draws[:, :3])) == {0.0, 1 / 0.7}
    assert (draws[:, 3] == 1).all()
    # The standard error of the mean is sqrt(0.3 / 0.7 / 4000), about 0.01.
    assert draws.mean(0) == pytest.approx([1, 1, 1, 1], abs=0.05)
    dropped = draws[:, :3] == 0
    assert abs(np.corrcoef(dropped.T) - np.eye(3)).max() < 0.08  # exits are drawn independently


def test_the_draw_is_a_function_of_seed_and_step() -> None:
    assert drop_factors(5, 0.5, 7, 11) == drop_factors(5, 0.5, 7, 11)
    assert len({tuple(drop_factors(8, 0.5, seed, step)) for seed in range(4) for step in range(10)}) > 30


def test_without_early_exits_there_is_nothing_to_leave_out() -> None:
    assert drop_factors(1, 0.9, 0, 0) == [1.0]
