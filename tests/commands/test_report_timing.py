"""`adaptive report A B`: milliseconds of one measurement, whatever the runs' evaluations say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from adaptive.runs import load
from tests.helpers.commands import Forks

pytestmark = pytest.mark.full  # the runs are timed

INVENTED = 1000.0  # milliseconds of an image at the first exit of one of them


@pytest.fixture(scope="module")
def pair(existing_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same run twice, whose evaluations were taken at hours that make one 4.6 times as slow."""
    trained = load(existing_run)
    root = tmp_path_factory.mktemp("pair")
    for name, first in (("one", INVENTED), ("other", INVENTED / 4.6)):
        shutil.copytree(existing_run, root / name)
        times = {"machine": "one", "device": "cpu", "batch": 64, "exits": [first, 2 * first, 3 * first]}
        weights = "ema" if trained.averaged else "plain"
        found = {"checkpoint": trained.checkpoint.path.name, "weights": weights, "milliseconds": times}
        (root / name / "evaluation_test.json").write_text(json.dumps(found))
    return [str(root / "one"), str(root / "other")]


def test_several_runs_are_timed_together(pair: list[str], forks: Forks, tmp_path: Path) -> None:
    words = ["report", *pair, "--workers", "0", "--device", "cpu", "--wall", "0", "--out", str(tmp_path / "page.html")]
    ended = forks.run([*words, "--json"])
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["timed_apart"] is False
    assert "accuracy_ms" in found["figures"]
    times = [[exit_["milliseconds"] for exit_ in run["exits"]] for run in found["runs"]]
    assert all(0 < time < INVENTED / 10 for row in times for time in row), "not those of the evaluations"
    assert 0.3 < times[0][-1] / times[1][-1] < 3, "the same network"
    assert all(run["timing"]["together"] and run["timing"]["batch"] == 64 for run in found["runs"])
    page = (tmp_path / "page.html").read_text()
    assert "timed together, interleaved, in one process, on" in page
    assert "timed apart" not in page


def test_without_timing_they_share_no_axis_and_are_told_what_to_do(
    pair: list[str], forks: Forks, tmp_path: Path
) -> None:
    words = ["report", *pair, "--workers", "0", "--wall", "0", "--no-timing", "--out", str(tmp_path / "page.html")]
    ended = forks.run(words)
    assert (ended.code, ended.err) == (0, "")
    assert "The runs were timed apart" in ended.out
    assert "Leave out --no-timing to time them together" in ended.out
    page = (tmp_path / "page.html").read_text()
    assert f"adaptive report {' '.join(pair)}</code>" in page
    assert not (tmp_path / "page_figures/accuracy_ms.png").exists()
    assert len(list((tmp_path / "page_figures").glob("*_accuracy_ms.png"))) == 2
    [one] = [json.loads(forks.run(["report", pair[0], *words[3:], "--json"]).out)["runs"]]
    assert one[0]["exits"][0]["milliseconds"] == INVENTED, "a single run shows its evaluation's"
