"""Tables and charts on the dashboard, against the real W&B client and a server on this machine."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from adaptive.config.sections import TrackingConfig
from adaptive.reporting.dashboard_report import EXIT_COLUMNS, accuracy_lines, exit_rows, show
from adaptive.tracking.dashboard import Dashboard, open_dashboard
from tests.reporting.reports import make_run, make_tiles
from tests.tracking.test_dashboard import LIMIT, get, open_in, stored_id, train, warnings

pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("isolated")


def test_rows_hold_the_runs_numbers():
    run = make_run()
    rows = exit_rows(run)
    assert [len(row) for row in rows] == [len(EXIT_COLUMNS)] * 3
    assert [row[0] for row in rows] == [1, 2, 3]
    assert sum(row[7] for row in rows) == pytest.approx(1)
    assert all(row[-2] < row[2] < row[-1] for row in rows)
    assert accuracy_lines(run)["policy"] == [(run.policy_macs, run.policy_top1)]
    bare = make_run(policy=False, evaluation=False)
    assert [row[5] for row in exit_rows(bare)] == [None] * 3
    assert list(accuracy_lines(bare)) == ["exits"]


def test_disabled_touches_nothing(run_folder):
    dashboard = Dashboard()
    dashboard.table("t", ["a"], [[{"image": "missing.png"}]])
    dashboard.lines("l", {"a": [(1, 2)]}, "title", "x")
    assert list(run_folder.iterdir()) == []


def test_offline_keeps_tables_charts_and_pictures(run_folder, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("shared.png")
    dashboard = open_in(run_folder, "offline")
    dashboard.table("pictures", ["image", "name", "ms"], [[{"image": "shared.png"}, "a", 1.5], [None, "b", None]])
    dashboard.lines("chart", {"exits": [(1, 50), (2, 60)], "policy": [(1.5, 58)]}, "accuracy", "MACs")
    dashboard.finish(0)
    [hint] = warnings(caplog)
    assert "adaptive dashboard --sync" in hint
    [stored] = [json.loads(path.read_text()) for path in run_folder.rglob("pictures*.table.json")]
    assert stored["columns"] == ["image", "name", "ms"]
    # The picture itself goes into the table's artifact; here it is named by its kind.
    assert stored["data"] == [["Image", "a", 1.5], [None, "b", None]]
    lines = [json.loads(path.read_text()) for path in run_folder.rglob("chart_table*.table.json")]
    assert sorted(row[1] for row in lines[0]["data"]) == ["exits", "exits", "policy"]


def test_a_missing_picture_costs_one_warning(run_folder, caplog):
    dashboard = open_in(run_folder, "offline")
    dashboard.table("pictures", ["image"], [[{"image": run_folder / "missing.png"}]])
    dashboard.finish(0)
    dashboard.table("pictures", ["image"], [])
    [warning] = warnings(caplog)
    assert "missing.png" in warning


def test_report_joins_the_trained_run_and_leaves_its_configuration(run_folder, server, monkeypatch, caplog):
    _, url = server
    monkeypatch.setenv("WANDB_BASE_URL", url)
    training = open_in(run_folder, "online", project="reports")
    train(training, 1, 2)
    training.finish(0)
    time.sleep(1.1)  # W&B names its folders by the second
    run = make_run()
    figure = run_folder / "shares.png"
    Image.new("RGB", (9, 9)).save(figure)
    tracking = TrackingConfig.model_validate({"wandb": "online", "init_timeout": LIMIT, "project": "reports"})
    dashboard = open_dashboard(tracking, run_folder, {"model": {"exits": 2}}, None)
    show(dashboard, run, make_tiles(run, 2), {"shares": figure})
    assert warnings(caplog) == []
    runs = get(f"{url}/api/v2/projects/default/reports/runs")["runs"]
    assert [found["run_id"] for found in runs] == [stored_id(run_folder)]
    stored = get(f"{url}/api/v2/runs/{stored_id(run_folder)}")["run"]
    assert stored["state"] == "finished"
    assert stored["config"]["notes"]["value"] == {"parameters": 11}
    # This server keeps plain values only; what was sent to it is in the client's own summary, the last one's.
    last = max(run_folder.glob("wandb/run-*/files/wandb-summary.json"))
    summary = json.loads(last.read_text())
    assert summary["report/exits"]["_type"] == "table-file"
    assert (summary["report/exits"]["nrows"], summary["report/images"]["nrows"]) == (3, 6)
    assert "image" in summary["report/shares"]["_type"]
    assert any(key.startswith("report/accuracy_against_macs") for key in summary)
    assert Path(figure).exists()
