"""What slows a whole machine down: a CPU quota that is used up, memory that is swapped."""

from collections import namedtuple

import psutil
import pytest
import torch

from adaptive.training.supervision import machine_load
from adaptive.training.supervision.machine_load import MachineLoad

Swap = namedtuple("Swap", "sin sout")


def test_a_quota_and_swapping_are_measured_since_the_call_before(monkeypatch: pytest.MonkeyPatch) -> None:
    periods, swapped, now = (100, 60), Swap(5 * 2**20, 0), 10.0
    monkeypatch.setattr(machine_load, "quota_periods", lambda: periods)
    monkeypatch.setattr(psutil, "swap_memory", lambda: swapped)
    monkeypatch.setattr(machine_load.time, "monotonic", lambda: now)
    machine = MachineLoad(torch.device("cpu"), whole=True)
    assert not {"throttled_percent", "swapped_mib_s"} & set(machine.sample())
    periods, swapped, now = (120, 76), Swap(6 * 2**20, 19 * 2**20), 14.0
    values = machine.sample()
    assert (values["throttled_percent"], values["swapped_mib_s"]) == (80.0, 5.0)
    periods = None
    assert not {"throttled_percent", "swapped_mib_s"} & set(machine.sample())
