"""Milliseconds on one axis only where they were taken together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaptive.reporting.milliseconds_figures import APART, milliseconds_figures, timed_apart
from adaptive.reporting.page import report_data, write_report
from adaptive.reporting.report_data import RunReport
from tests.reporting.reports import make_run


def timed(name: str, factor: float, **changes: Any) -> RunReport:
    """A run whose evaluation took so many times as long, as in another hour."""
    run = make_run(name=name, folder=f"runs/{name}", images=60)
    assert run.timing is not None
    slower = [factor * value for value in run.timing.milliseconds]
    return replace(run, timing=replace(run.timing, milliseconds=slower, **changes))


def test_evaluations_of_two_sessions_share_no_axis_and_the_page_says_so(tmp_path: Path) -> None:
    runs = [timed("alpha", 1), timed("beta", 4.6)]
    assert timed_apart(runs)
    drawings = milliseconds_figures(runs)
    assert [drawing.name for drawing in drawings] == ["1_alpha_accuracy_ms", "2_beta_accuracy_ms"]
    for run, drawing in zip(runs, drawings, strict=True):
        assert drawing.caption.startswith(f"{run.name}, timed apart from the others. ")
        other = "beta" if run.name == "alpha" else "alpha"
        assert other not in drawing.caption + drawing.alt + drawing.svg
    written = write_report(runs, tmp_path / "report.html", tmp_path / "figures")
    assert not {"accuracy_ms"} & set(written.figures)
    text = written.page.read_text()
    assert APART in text
    assert "adaptive report runs/alpha runs/beta</code>" in text
    data = report_data(runs, None)
    assert data["timed_apart"] is True
    assert [run["timing"]["together"] for run in data["runs"]] == [False, False]


def test_what_was_timed_together_shares_an_axis_and_the_caption_says_how(tmp_path: Path) -> None:
    runs = [timed("alpha", 1, together=True), timed("beta", 0.6, together=True)]
    [drawing] = milliseconds_figures(runs)
    assert drawing.name == "accuracy_ms"
    assert "timed together, interleaved, in one process, on a machine" in drawing.caption
    assert "beta" in drawing.svg
    written = write_report(runs, tmp_path / "report.html", tmp_path / "figures")
    assert APART not in written.page.read_text()
    assert report_data(runs, None)["timed_apart"] is False


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"machine": "another"}, {"batch": 1}, {"together": False}])
def test_another_device_machine_batch_or_moment_is_apart(change: dict[str, Any]) -> None:
    runs = [timed("alpha", 1, together=True), timed("beta", 1, **({"together": True} | change))]
    assert timed_apart(runs)
    assert len(milliseconds_figures(runs)) == 2


def test_one_timed_run_is_compared_with_nothing() -> None:
    runs = [timed("alpha", 1), make_run(evaluation=False, images=60)]
    assert not timed_apart(runs)
    [drawing] = milliseconds_figures(runs)
    assert "measured on a machine" in drawing.caption
    assert milliseconds_figures(runs[1:]) == []


def test_the_page_advises_to_calibrate_the_run_that_can_be(tmp_path: Path) -> None:
    """Of a plain run and one with exits, neither with a policy."""
    plain = make_run(exits=1, policy=False, name="plain", folder="runs/plain", images=60)
    early = make_run(policy=False, name="early", folder="runs/early", images=60)
    text = write_report([plain, early], tmp_path / "report.html", tmp_path / "figures").page.read_text()
    assert "adaptive calibrate runs/early --budget 0.5" in text
    assert "calibrate RUN" not in text
    assert "calibrate runs/plain" not in text
