"""The page and the exit code of promised_time.py, without a clock."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import promised_time
from benchmarks.shared.results import machine

ROW = {
    "run": "one",
    "backbone": "resnet10t",
    "batch": 16,
    "kind": "confidence",
    "shares": [0.5, 0.5],
    "promised": 1.0,
    "clock": 1.02,
    "by_round": {"median": 1.01, "q1": 0.99, "q3": 1.03},
    "of_full_batches": 1.49,
    "noise": 0.01,
    "tries": 1,
    "noisy": False,
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a made-up machine measures, row by row."""
    left = [
        {**ROW, "runtime": "torch", "ratio": 1.02, "kept": True},
        {**ROW, "runtime": "onnx", "ratio": 1.08, "kept": False, "noise": 0.07, "noisy": True, "tries": 3},
    ]

    def measured(_folder: Path, _options: Any, known: list[dict[str, Any]]) -> Any:
        done = {row["runtime"] for row in known}
        for row in left:
            if row["runtime"] not in done:
                yield row
                if len(left) == 3:
                    raise KeyboardInterrupt

    monkeypatch.setattr(promised_time, "_rows", measured)
    return left


def test_a_limit_that_does_not_hold_ends_with_one(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    words = ["one", "--batches", "16", "--output", str(tmp_path)]
    assert promised_time.main(words) == 1
    page = (tmp_path / "promised_time.md").read_text()
    assert "`python benchmarks/promised_time.py --batches 16 RUN...`" in page
    assert "The limit does not hold in 1 rows." in page
    assert "7.0 %, too noisy after 3 tries; 1.010 (0.990 to 1.030) within rounds" in page
    assert promised_time.main([*words, "--runtimes", "torch"]) == 0
    assert "The limit holds in every row." in (tmp_path / "promised_time.md").read_text()


def test_a_second_call_goes_on_where_the_first_one_stopped(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    rows.append({})
    words = ["one", "--batches", "16", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        promised_time.main(words)
    kept = json.loads((tmp_path / "promised_time.rows.json").read_text())
    assert [row["runtime"] for row in kept["rows"]] == ["torch"]
    assert kept["machine"] == machine("cpu") | {"threads": 1}
    rows.pop()
    rows[0]["ratio"] = 99  # were it measured again
    promised_time.main(words)
    result = json.loads((tmp_path / "promised_time.json").read_text())
    assert [row["ratio"] for row in result["rows"]] == [1.02, 1.08]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RUN: none given"),
        (["one", "--rounds", "3"], "--rounds 3: give 4 or more"),
        (["one", "--batches", "0"], "--batches 0: sizes begin at 1"),
        (["one", "--device", "cuda"], "--device cuda: onnx is timed on the processor; give --runtimes torch compile"),
        (["no-such-run"], "no-such-run is no run folder"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promised_time.main([*words, "--output", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err
