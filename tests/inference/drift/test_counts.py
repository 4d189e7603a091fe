"""Counts by exit and confidence: by hand, of numpy and torch, in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptive.errors import PolicyError
from adaptive.inference.drift import counts as module
from adaptive.inference.drift.counts import EDGES, Counts, Tally


def images(number: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(1, 4, (number,), generator=generator), torch.rand(number, generator=generator)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_by_hand(kind) -> None:
    sure = np.array([0.05, 0.1, 0.95, 0.9999, 1.0], np.float32)
    found = Counts.of(kind(np.array([1, 1, 2, 2, 2])), kind(sure), 3)
    expected = [[0] * (len(EDGES) + 1) for _ in range(3)]
    expected[0][0] = expected[0][1] = 1
    expected[1][EDGES.index(0.95) + 1] = 1
    expected[1][-1] = 2
    assert found.cells == expected
    assert (found.images, found.leaving) == (5, [2, 3, 0])


def test_in_pieces_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exits, sure = images()
    whole = Counts.of(exits, sure, 3)
    for at_once, most in ((7, 1000), (1000, 3)):
        monkeypatch.setattr(module, "_AT_ONCE", at_once)
        monkeypatch.setattr(module, "_MOST_BATCHES", most)
        tally = Tally(3)
        for a, b in zip(exits.split(5), sure.split(5), strict=True):
            mine, own = a.clone(), b.clone()
            tally.add(mine, own)
            mine.fill_(1)  # whoever was given them may change them
            own.fill_(0)
        assert tally.counts() == tally.counts() == whole
    half = Counts.of(exits[:100], sure[:100], 3) + Counts.of(exits[100:], sure[100:], 3)
    assert half == whole
    assert whole + Counts.none(3) == whole
    assert Tally(3).counts() == Counts.none(3)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PolicyError, match="counts at 3 and at 2 exits"):
        Counts.none(3) + Counts.none(2)
    with pytest.raises(PolicyError, match="other bins of confidence"):
        Counts.none(1) + Counts(edges=[0.5], cells=[[1, 2]])
    with pytest.raises(ValueError, match="1 edges make 2 bins"):
        Counts(edges=[0.5], cells=[[1, 2, 3]])
