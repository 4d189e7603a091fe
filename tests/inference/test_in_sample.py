"""Which figures are in-sample: by facts about the images, and not by the split's name alone."""

from __future__ import annotations

from typing import Any

import pytest

from adaptive.inference.in_sample import NOTHING, InSample, policy_on
from adaptive.inference.policy import Calibration, Policy

HERE, OTHER = "a" * 64, "b" * 64


def policy(target: str = "budget", **changes: Any) -> Policy:
    calibration = Calibration(
        method="search",
        target={target: 0.5},
        unit="MACs",
        costs=[1, 2],
        images=10,
        top1=90.0,
        cost=1.5,
        counts=[5, 5],
        **{"split": "val", "dataset": HERE, **changes},
    )
    return Policy(thresholds=[0.5, 0.0], calibration=calibration)


@pytest.mark.parametrize(
    ("given", "split", "dataset", "expected"),
    [
        (policy(), "val", HERE, InSample(policy=True)),
        (policy("epsilon"), "val", HERE, InSample(policy=True, tested=True)),
        (policy(), "test", HERE, NOTHING),
        (policy(), "val", OTHER, NOTHING),
        (policy(dataset=""), "val", HERE, InSample(policy=True)),  # of an earlier version: taken for the run's own
        (policy(dataset=""), "val", OTHER, NOTHING),
        (Policy(thresholds=[0.5, 0.0]), "val", HERE, NOTHING),
        (None, "val", HERE, NOTHING),
    ],
)
def test_facts_decide(given: Policy | None, split: str, dataset: str, expected: InSample) -> None:
    assert policy_on(given, split, dataset, HERE) == expected


def test_headlines() -> None:
    assert NOTHING.headline == ""
    assert not NOTHING
    assert InSample(checkpoint=True).headline == "in-sample: these images chose the checkpoint"
    assert InSample(True, True).headline == "in-sample: these images chose the checkpoint and the policy"
    assert InSample(policy=True, tested=True).headline == (
        "in-sample: half of these images chose the policy, the others tested it"
    )
    assert InSample(True, True).chose == ["checkpoint", "policy"]
