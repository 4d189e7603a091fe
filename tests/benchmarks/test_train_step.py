"""The benchmark of the training step on a tiny network: what it writes, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.shared.memory import peak_bytes
from benchmarks.shared.timing import Spread, interleaved, ratios
from benchmarks.train_step import main
from tests.helpers.locations import REPOSITORY
from tests.helpers.ranks import run_ranks

TINY = ["--backbone", "test_resnet", "--exits", "3", "--image-size", "32", "--batch", "4", "--classes", "10"]
SHORT = ["--rounds", "2", "--warmup", "1", "--repetitions", "2", "--device", "cpu"]
VARIANTS = ["plain", "loop", "exits", "equilibrium", "collaboration", "collaboration_distillation"]


def check(result: dict) -> None:
    variants = result["variants"]
    assert list(variants) == VARIANTS
    for key, entry in variants.items():
        for name in ("images_per_second", "step_ms"):
            assert 0 < entry[name]["q1"] <= entry[name]["median"] <= entry[name]["q3"]
        for name in ("time_over_plain", "time_per_mac_over_plain", "time_over_previous", "memory_over_plain"):
            assert (entry[name] is None) == (key == "plain")
        for name in ("time_over_loop", "memory_over_loop"):
            assert (entry[name] is None) == (key in ("plain", "loop"))
        # Weights, their gradients and the momentum are there at once.
        assert entry["peak_memory_bytes"] > 3 * 4 * entry["parameters"]
    sizes = [variants[key]["parameters"] for key in VARIANTS]
    assert sizes[0] < sizes[1] == sizes[2] == sizes[3] < sizes[4] == sizes[5]
    macs = [variants[key]["macs"] for key in VARIANTS]
    assert macs[0] < macs[1] == macs[2] == macs[3] < macs[4] == macs[5]
    assert set(result["ge_share_percent"]) == {"median", "q1", "q3"}
    assert len(result["ge_shapes"]) == 2


@pytest.mark.full
def test_the_command_writes_a_table_and_json(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    script = str(REPOSITORY / "benchmarks" / "train_step.py")
    options = ["--threads", "1", "--precision", "bf16", "--channels-last"]
    words = [sys.executable, script, *TINY, *SHORT, *options, "--output", str(tmp_path), "--json", str(copy)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "GE's share of the step" in done.stdout
    path = tmp_path / "train_step_cpu_test_resnet.json"
    result = json.loads(path.read_text())
    assert copy.read_text() == path.read_text()
    check(result)
    assert str(tmp_path) not in result["command"]
    assert "--exits 3" in result["command"]
    page = path.with_suffix(".md").read_text()
    for entry in result["variants"].values():
        assert f"| {entry['title']} |" in page


@pytest.mark.full  # the exits' number comes from create_model, a real network's step takes its time
def test_a_preset_brings_its_exits(tmp_path: Path) -> None:
    words = ["--backbone", "msdnet_cifar_budgeted", "--exits", "0", "--image-size", "32", "--batch", "2"]
    assert main([*words, "--rounds", "2", "--repetitions", "2", "--device", "cpu", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "train_step_cpu_msdnet_cifar_budgeted.json").read_text())
    assert len(result["ge_shapes"]) == 4


@pytest.mark.full
def test_under_the_librarys_engine(tmp_path: Path) -> None:
    # In a process of its own: the engine makes it a rank.
    options = ["--engine", "deepspeed", "--channels-last"]
    assert run_ranks(main, 1, [*TINY, *SHORT, *options, "--output", str(tmp_path)]) == [0]
    result = json.loads((tmp_path / "train_step_cpu_test_resnet.json").read_text())
    check(result)


@pytest.mark.parametrize(
    ("options", "named"), [(["--rounds", "1"], "--rounds"), (["--backbone", "no_such_model"], "no_such_model")]
)
def test_mistakes_are_one_line(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SHORT, *options, "--output", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_peak_memory_is_exact() -> None:
    class Step:
        def __init__(self) -> None:
            self.kept = torch.zeros(1000)

        def __call__(self) -> None:
            temporary = torch.zeros(5000)
            del temporary
            self.more = torch.zeros(300)

        def close(self) -> None:
            pass

    # The first two calls leave one "more" behind, which lives while the third call makes its own.
    assert peak_bytes(Step, "cpu") == 4 * (1000 + 300 + 5000)


def test_every_round_holds_every_function_in_changing_order() -> None:
    called: list[str] = []
    turns = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = interleaved(turns, rounds=6, warmup=2, device="cpu")
    assert {name: len(values) for name, values in seconds.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [called[i : i + 3] for i in range(0, len(called), 3)]
    assert len(rounds) == 8
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1


def test_ratios_are_formed_within_the_round() -> None:
    seconds = {"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}
    assert ratios(seconds, "a", "b") == Spread(2.0, 2.0, 2.0)
