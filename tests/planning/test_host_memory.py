"""The machine's memory as it is predicted: by hand, and against a process that builds a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaptive.networks.fake_copy import is_outline
from adaptive.planning.checked_plan import check_plan
from adaptive.planning.host_memory import CUDA, LIBRARIES, WORKER, host_memory
from adaptive.planning.memory import Moment, RankMemory
from adaptive.planning.plan import make_plan
from tests.training.setups import config

MIB = 2**20
MEMORY = RankMemory((Moment("step", {"weights": 300 * MIB}),), {"checkpoint (first rank)": 200 * MIB})


@pytest.mark.parametrize(("cuda", "training"), [(True, LIBRARIES + CUDA + 100 * MIB), (False, LIBRARIES + 300 * MIB)])
def test_what_ranks_of_a_node_take_by_hand(cuda: bool, training: int) -> None:
    tree = config("unused", data={"workers": 0})
    found = host_memory(tree, MEMORY, 100 * MIB, 4, 8, 7 * MIB, cuda)
    assert found.start == LIBRARIES + cuda * CUDA + 100 * MIB + 200 * MIB
    assert found.training == training
    assert found.node == 8 * max(found.start, training) + 200 * MIB + 7 * MIB


def test_loader_processes_take_theirs_but_with_images_in_memory() -> None:
    some, none = config("unused", data={"workers": 3}), config("unused", data={"workers": 3, "in_memory": True})
    image = 4 * 3 * 32**2
    with_workers = host_memory(some, MEMORY, MIB, 4, 1, 0, True)
    assert with_workers.training - host_memory(none, MEMORY, MIB, 4, 1, 0, True).training == 3 * (WORKER + 8 * image)


def test_a_plan_builds_no_network(digits: Path, tmp_path: Path) -> None:
    checked = check_plan(config(digits, tmp_path / "run"), 2, 1)
    assert is_outline(checked.network)
    plan = make_plan(checked, cuda=True)
    stored = sum(t.numel() * t.element_size() for t in checked.network.state_dict().values())
    assert stored < plan.host.start - LIBRARIES - CUDA < 5 * stored
