"""What runners count of the images that they let go, and the file that several of them add to."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.errors import DataError, PolicyError
from adaptive.inference.drift.counts import Counts
from adaptive.inference.drift.seen import Seen
from adaptive.inference.outputs import simulate
from adaptive.inference.policy import Policy
from adaptive.inference.runner import DynamicClassifier
from tests.inference.test_runner import halving, images, network, stored

FAMILY = "test_resnet"
POLICY = Policy(thresholds=[0.9, 0.0])


def expected(policy: Policy, logits: torch.Tensor) -> Counts:
    found = simulate(policy, [policy.probabilities(i, z) for i, z in enumerate(logits)])
    return Counts.of(found.exits, found.confidences, policy.exits)


def some(left: int, right: int, policy: Policy = POLICY) -> Seen:
    return Seen.of(policy, Counts.of(torch.tensor([1] * left + [2] * right), torch.full((left + right,), 0.95), 2))


@pytest.mark.parametrize("kind", ["confidence", "patience"])
def test_every_way_to_run_counts_the_same(kind: Any) -> None:
    logits, net = stored(FAMILY), network(FAMILY)
    policy = halving(kind, logits)
    counts = expected(policy, logits)
    assert sum(count > 0 for count in counts.leaving) > 2
    classifier = DynamicClassifier(net, policy, seen=True)
    classifier.predict(images(net))
    assert classifier.seen == Seen.of(policy, counts)
    classifier.run(images(net)[:0])
    for _ in classifier.stream(images(net).split(7), batch=8):
        pass
    assert classifier.seen.counts == counts + counts
    further = DynamicClassifier(net, policy, seen=classifier.seen, accelerate=lambda stage, *_: stage)
    further.run(images(net))
    assert further.seen.images == 3 * len(images(net))
    with pytest.raises(PolicyError, match="keeps no counts; make it with seen=True"):
        _ = DynamicClassifier(net, policy).seen


def test_what_was_refused_is_not_counted() -> None:
    net = network(FAMILY)
    classifier = DynamicClassifier(net, halving("confidence", stored(FAMILY)), seen=True)
    broken = images(net).clone()
    broken[3] = torch.nan
    with pytest.raises(DataError):
        classifier.run(broken)
    with pytest.raises(DataError):
        list(classifier.stream([broken], batch=8))
    assert classifier.seen.images == 0


def test_a_file_adds_up(tmp_path: Path) -> None:
    file = tmp_path / "seen.json"
    assert some(3, 1).add_to(file) == some(3, 1)
    assert some(2, 2).add_to(file) == some(5, 3) == Seen.load(file)
    assert some(5, 3).shares == [0.625, 0.375]


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "seen.json"
    writers = [threading.Thread(target=lambda: [some(1, 2).add_to(file) for _ in range(3)]) for _ in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert Seen.load(file) == some(12, 24)


def test_files_that_do_not_fit_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "seen.json"
    some(3, 1).add_to(file)
    before = file.read_bytes()
    with pytest.raises(PolicyError, match=r"counts of two policies, with thresholds 0\.9 and 0\.8"):
        some(1, 1, Policy(thresholds=[0.8, 0.0])).add_to(file)
    assert file.read_bytes() == before
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(PolicyError, match=r"other\.json holds no counts: policy: Field required; give another file"):
        some(1, 1).add_to(other)
    assert other.read_text() == "{}"
    with pytest.raises(PolicyError, match=r"counts .*other\.json/seen\.json cannot be written: "):
        some(1, 1).add_to(other / "seen.json")
    with pytest.raises(PolicyError, match=r"cannot be read \(No such file or directory\); make them with: "):
        Seen.load(tmp_path / "nothing.json")


def test_all_that_decides_tells_policies_apart() -> None:
    others = [
        Policy(thresholds=[0.9, -1.0]),
        Policy(thresholds=[0.9, 0.0], kind="margin"),
        Policy(thresholds=[0.9, 0.0], temperatures=[1.0, 2.0]),
    ]
    for other in others:
        with pytest.raises(PolicyError, match="counts of another policy"):
            some(1, 1).check(other)
    some(1, 1).check(Policy.model_validate_json(POLICY.model_dump_json()))
