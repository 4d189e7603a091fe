"""What a plan advises is what the run's own checks take."""

from dataclasses import replace
from pathlib import Path

from adaptive.planning.checked_plan import check_plan
from adaptive.planning.plan import make_plan
from tests.training.setups import config


def test_no_micro_batch_is_advised_that_would_be_refused(digits: Path, tmp_path: Path) -> None:
    """Images are mixed in pairs, and BatchNorm wants two: memory for one or three images is no reason to name them."""
    asked = {"train": {"global_batch": 6, "device": "cpu"}, "evaluate": {"batch": 1}}
    plan = make_plan(check_plan(config(digits, tmp_path / "run", **asked), 1, 1), cuda=False)
    mixed = config(digits, tmp_path / "run", data={"mixup": 0.2}, **asked)
    pairs = replace(plan, checked=replace(plan.checked, config=mixed))
    needed = {n: plan.needed(plan._most(replace(plan.settings, accumulation=6 // n), n)) for n in (1, 2, 3, 6)}
    limits = {"one": needed[1], "two": needed[2], "between": needed[6] - 1, "all": needed[6]}
    assert needed[1] < needed[2] < needed[3] < needed[6]
    for sizes, expected in ((plan, [None, 2, 3, 6]), (pairs, [None, 2, 2, 6])):
        assert [sizes.largest_micro_batch(limit) for limit in limits.values()] == expected
    assert [word for word in plan.remedies(needed[1]) if "train.micro_batch" in word] == []
    assert "train.micro_batch=2, the largest that fits" in pairs.remedies(limits["between"])
