from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from adaptive.distributed import control_group


def test_what_is_left_of_the_machine_and_of_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_group, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert control_group.available_memory() == 5000
    (tmp_path / "memory.max").write_text("4000\n")
    (tmp_path / "memory.current").write_text("3900\n")
    assert control_group.available_memory() == 100
    (tmp_path / "memory.stat").write_text("anon 1700\nfile 2200\ninactive_file 2000\n")
    assert control_group.available_memory() == 2100  # files that were read make room
    (tmp_path / "memory.max").write_text("90000\n")
    assert control_group.available_memory() == 5000
    (tmp_path / "memory.max").write_text("100\n")
    (tmp_path / "memory.stat").unlink()
    assert control_group.available_memory() == 0


def test_how_often_a_quota_was_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_group, "CGROUP", tmp_path)
    assert control_group.quota_periods() is None
    (tmp_path / "cpu.stat").write_text("usage_usec 500\nnr_periods 0\nnr_throttled 0\nthrottled_usec 0\n")
    assert control_group.quota_periods() is None  # no quota, in version 2
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.stat").write_text("nr_periods 200\nnr_throttled 150\nthrottled_time 9\n")
    assert control_group.quota_periods() == (200, 150)
