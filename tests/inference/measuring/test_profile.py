"""What the profiler says, checked by what must hold on any machine."""

import pytest
import torch

from adaptive.inference.acceleration.cuda_graphs import Graphs
from adaptive.inference.measuring.profile import profile
from adaptive.inference.measuring.timing import Spread
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from tests.inference.acceleration.test_accelerated import Replays
from tests.inference.test_runner import halving, images, network, stored


def test_profile_counts_who_is_still_in_and_adds_up() -> None:
    net, logits = network("test_resnet"), stored("test_resnet")
    policy = halving("confidence", logits)
    found = profile(net, policy, images(net), rounds=3)
    left = [int(n) for n in torch.bincount(_exits(policy, logits) - 1, minlength=4)]
    assert found.still_in == [(40 - sum(left[:i])) / 40 for i in range(4)]
    assert found.batch == 40
    assert found.milliseconds == sorted(found.milliseconds)
    total = sum(part.block + part.exit for part in found.blocks)
    assert found.milliseconds[-1] == pytest.approx(total / 40)
    assert 0 < found.decisions < found.dynamic + found.full


def test_the_ideal_is_each_blocks_own_time_for_who_is_still_in() -> None:
    net, logits = network("test_resnet"), stored("test_resnet")
    found = profile(
        net, halving("confidence", logits), images(net), rounds=1
    )  # one round: nothing is a median of others
    shares = zip(found.still_in, found.blocks, strict=True)
    assert found.ideal == pytest.approx(sum(share * (part.block + part.exit) for share, part in shares))
    assert found.ideal < sum(part.block + part.exit for part in found.blocks)


def test_accelerated_runners_are_measured_in_the_same_rounds() -> None:
    net = network("test_resnet")
    policy = halving("confidence", stored("test_resnet"))
    found = profile(net, policy, images(net)[:12], rounds=2, accelerate={"cuda_graphs": Graphs(Replays())})
    [times] = found.accelerated
    assert times.accelerate == "cuda_graphs"
    assert times.prepared <= 4, "a stage each, at the size that its images take"
    assert times.seconds > 0
    assert min(times.dynamic, times.straight, times.over_eager.median, times.over_full.median) > 0


def _exits(policy: Policy, logits: torch.Tensor) -> torch.Tensor:
    from tests.inference.test_runner import expected

    return expected(policy, logits).exits


def test_everybody_at_the_first_exit_takes_the_first_blocks_time() -> None:
    net = network("test_resnet")
    found = profile(net, Policy(thresholds=[EVERYBODY] * 4), images(net), rounds=2)
    assert found.still_in == [1, 0, 0, 0]
    nobody = profile(net, Policy(thresholds=[NOBODY] * 3 + [EVERYBODY]), images(net), rounds=2)
    assert nobody.still_in == [1, 1, 1, 1]


def test_spread_of_one_and_of_several() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of_ratios([2.0, 9.0], [1.0, 3.0]) == Spread(2.5, 2.25, 2.75)
    assert Spread.of([1.0]).scaled(1e3).median == 1000
