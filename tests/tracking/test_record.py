import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive.errors import DataError, MachineError
from adaptive.tracking.record import Record, read
from tests.helpers.waiting import wait_until


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write_steps(path: Path, *steps: int) -> Record:
    record = Record(path)
    for step in steps:
        record.write({"step": step, "epoch": 1, "samples": 8 * step, "train/loss": 1 / step})
    return record


def test_records_come_back_in_order(path):
    write_steps(path, 1, 2, 3)
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    assert read(path)[1] == {"step": 2, "epoch": 1, "samples": 16, "train/loss": 0.5}


def test_numbers_that_are_not_finite_survive_in_valid_json(path):
    Record(path).write(
        {"step": 1, "a": math.nan, "b": math.inf, "c": [-math.inf, 1.0], "d": None, "e": {"f": math.inf}}
    )
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": ["-inf", 1.0], "d": None, "e": {"f": "inf"}}
    [record] = read(path)
    assert math.isnan(record["a"])
    assert record["b"] == math.inf
    assert record["c"] == [-math.inf, 1.0]
    assert record["d"] is None
    assert record["e"] == {"f": math.inf}


def test_scalars_of_numpy_and_torch_are_numbers(path):
    Record(path).write({"step": 1, "a": np.float32(0.5), "b": torch.tensor(2), "c": torch.tensor(math.nan)})
    assert path.read_text() == '{"step": 1, "a": 0.5, "b": 2, "c": "nan"}\n'


@pytest.mark.parametrize("values", [{}, {"step": "1"}, {"step": 1.5}])
def test_a_record_without_a_step_is_refused(path, values):
    with pytest.raises(ValueError, match="integer 'step'"):
        Record(path).write(values)
    assert not path.exists()


def test_a_torn_last_line_is_passed_over_and_dropped_on_opening(path):
    write_steps(path, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "tra')
    assert [r["step"] for r in read(path)] == [1, 2]
    write_steps(path, 3)
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    assert path.read_bytes().startswith(whole)


def test_zeros_after_a_power_cut_count_as_torn(path):
    write_steps(path, 1, 2)
    path.write_bytes(path.read_bytes() + bytes(20) + b"\n")
    assert [r["step"] for r in read(path)] == [1, 2]
    Record(path).trim(2)
    assert b"\0" not in path.read_bytes()


def test_damage_elsewhere_is_an_error_with_its_line(path):
    write_steps(path, 1, 2, 3)
    path.write_bytes(path.read_bytes().replace(b'{"step": 2', b'{"st'))
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2"):
        read(path)
    with pytest.raises(DataError, match="line 2"):
        Record(path).trim(1)


def test_trim_makes_a_resumed_log_equal_an_undisturbed_one(path, tmp_path):
    undisturbed = tmp_path / "undisturbed.jsonl"
    write_steps(undisturbed, 1, 2, 3, 4, 5, 6)
    write_steps(path, 1, 2, 3, 4, 5)
    with path.open("ab") as file:
        file.write(b'{"step": 6, "ep')
    record = Record(path)
    record.trim(3)
    assert [r["step"] for r in read(path)] == [1, 2, 3]
    write_steps(path, 4, 5, 6)
    assert path.read_bytes() == undisturbed.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "undisturbed.jsonl"]


def test_trim_without_a_log_or_without_later_records_changes_nothing(path):
    Record(path).trim(10)
    assert not path.exists()
    record = write_steps(path, 1, 2)
    before = path.stat().st_ino
    record.trim(2)
    assert path.stat().st_ino == before
    record.trim(0)
    assert read(path) == []


def test_a_failing_trim_leaves_the_log_as_it_was(path, monkeypatch):
    record = write_steps(path, 1, 2)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="No space left"):
        record.trim(1)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_an_error_that_names_the_file():
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(MachineError, match=r"/dev/full.*[Nn]o space left"):
        Record("/dev/full").write({"step": 1})


def test_a_partly_written_line_is_taken_back(path, monkeypatch):
    record = write_steps(path, 1)
    before = path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
    with pytest.raises(MachineError, match="disk full"):
        record.write({"step": 2})
    assert path.read_bytes() == before


def test_a_missing_folder_or_a_folder_in_its_place_is_an_error(tmp_path):
    with pytest.raises(MachineError, match="nowhere"):
        Record(tmp_path / "nowhere" / "metrics.jsonl").write({"step": 1})
    with pytest.raises(MachineError, match=str(tmp_path)):
        Record(tmp_path).write({"step": 1})
    with pytest.raises(MachineError, match="cannot read"):
        read(tmp_path / "metrics.jsonl")


def test_a_kill_leaves_at_most_a_torn_last_line(path):
    code = (
        "import sys; from adaptive.tracking.record import Record\n"
        "record = Record(sys.argv[1])\n"
        "for step in range(1, 10**9): record.write({'step': step, 'text': 'x' * 500})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    wait_until(lambda: path.exists() and path.stat().st_size >= 100_000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = [r["step"] for r in read(path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > 100
