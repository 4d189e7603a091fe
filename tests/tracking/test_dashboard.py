"""The dashboard against the real W&B client: offline, with a server on this machine, with dead and hanging ones."""

import json
import logging
import math
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive.config.sections import TrackingConfig
from adaptive.tracking import dashboard as dashboard_module
from adaptive.tracking.dashboard import Dashboard, open_dashboard
from tests.helpers.waiting import PATIENCE
from tests.tracking.conftest import KEY

pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("isolated")
LIMIT = 120.0


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


def open_in(run_folder: Path, mode: str, limit: float = LIMIT, **settings: Any) -> Dashboard:
    tracking = TrackingConfig.model_validate({"wandb": mode, "init_timeout": limit, **settings})
    return open_dashboard(tracking, run_folder, {"model": {"exits": 2}}, {"parameters": 11})


def train(dashboard: Dashboard, first: int, last: int) -> None:
    for step in range(first, last + 1):
        dashboard.log({"epoch": 1, "samples": 8 * step, "train/loss": 1 / step, "val/exit_1/top1": 10.0 * step}, step)


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def stored_id(run_folder: Path) -> str:
    return (run_folder / "wandb" / "run_id").read_text().strip()


def expect_no_key(run_folder: Path) -> None:
    """The key is the user's secret: neither the run folder nor the client's logs hold it."""
    files = [path for path in run_folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_of_two_that_choose_an_id_both_take_the_first(tmp_path, monkeypatch):
    """A start of training, and a report that is sent to W&B."""

    def late(_):
        (tmp_path / "run_id").write_text("first\n")
        return "second"

    monkeypatch.setattr(dashboard_module.secrets, "token_hex", late)
    assert dashboard_module._run_id(tmp_path / "run_id") == "first"
    assert (tmp_path / "run_id").read_text() == "first\n"


def test_disabled_touches_nothing(run_folder):
    dashboard = open_in(run_folder, "disabled")
    train(dashboard, 1, 3)
    dashboard.summary({"best": 1.0})
    dashboard.image("curves", "missing.png")
    dashboard.finish(0)
    assert type(dashboard) is Dashboard
    assert list(run_folder.iterdir()) == []


def test_offline_keeps_its_id_and_says_once_how_to_upload(run_folder, caplog, capfd):
    Image.new("RGB", (4, 4)).save(run_folder / "curves.png")
    for first, last in ((1, 3), (4, 6)):
        dashboard = open_in(run_folder, "offline")
        before = stored_id(run_folder)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they are for the job, not for its client
            dashboard._process.send_signal(number)  # type: ignore[attr-defined]
        train(dashboard, first, last)
        dashboard.image("curves", run_folder / "curves.png")
        dashboard.summary({"best": 60.0})
        dashboard.finish(0)
        dashboard.finish(0)
        assert stored_id(run_folder) == before
        [hint] = warnings(caplog)
        caplog.clear()
        assert hint == f"W&B was offline; to upload this run: adaptive dashboard --sync {run_folder}"
        # W&B names the folders by the second.
        time.sleep(1.1)
    logs = list((run_folder / "wandb").glob(f"offline-run-*/run-{before}.wandb"))
    assert len(logs) == 2
    assert all(log.stat().st_size > 500 for log in logs)
    expect_no_key(run_folder)
    assert capfd.readouterr().out == ""


def test_two_openings_online_are_one_run_with_every_value(run_folder, server, monkeypatch, caplog):
    _, url = server
    monkeypatch.setenv("WANDB_BASE_URL", url)
    first = open_in(run_folder, "online", project="exits", name="first", tags=["a"])
    first.log({"val/exit_1/top1": math.nan}, 0)
    train(first, 1, 3)
    first.finish(1)
    second = open_in(run_folder, "online", project="exits", name="first", tags=["a"])
    train(second, 4, 6)
    second.summary({"best/top1": 60.0})
    second.finish(0)
    assert warnings(caplog) == []

    runs = get(f"{url}/api/v2/projects/default/exits/runs")["runs"]
    assert [run["run_id"] for run in runs] == [stored_id(run_folder)]
    run = get(f"{url}/api/v2/runs/{stored_id(run_folder)}")["run"]
    assert run["display_name"] == "first"
    assert run["state"] == "finished"
    assert run["summary"]["best/top1"] == 60.0
    assert run["config"]["model"]["value"] == {"exits": 2}
    assert run["config"]["notes"]["value"] == {"parameters": 11}

    metrics = get(f"{url}/api/v2/runs/{stored_id(run_folder)}/metrics")["metrics_by_key"]
    assert sorted(point["value"] for point in metrics["step"]) == [0, 1, 2, 3, 4, 5, 6]
    assert sorted(point["value"] for point in metrics["train/loss"]) == sorted(1 / step for step in range(1, 7))
    # This server keeps what is not a number as null.
    assert {point["value"] for point in metrics["val/exit_1/top1"]} == {None, *(10.0 * step for step in range(1, 7))}

    # The client's telemetry lists the metrics that were defined, in an order of its own: 1 is a name, 2 a pattern, 5
    # the position of the axis in this list, from 1.
    telemetry = run["config"]["_wandb"]["value"]["m"]
    axes = {m["2"]: telemetry[m["5"] - 1].get("1") for m in telemetry if "2" in m and "5" in m}
    assert axes["train/*"] == "step"
    assert axes["val/*"] == "step"

    expect_no_key(run_folder)


def test_a_server_that_refuses_costs_one_warning_and_a_bounded_wait(run_folder, caplog):
    begin = time.monotonic()
    dashboard = open_in(run_folder, "online", limit=4)
    assert stored_id(run_folder)
    train(dashboard, 1, 100)
    dashboard.summary({"best": 1.0})
    dashboard.finish(0)
    assert time.monotonic() - begin < 60  # not 4 s for each of the 100
    [warning] = warnings(caplog)
    assert "W&B is switched off, the run goes on without it (start" in warning


def test_a_server_that_never_answers_costs_one_warning_and_a_bounded_wait(run_folder, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        dashboard = open_in(run_folder, "online", limit=4)
        train(dashboard, 1, 100)
        dashboard.finish(0)
        assert time.monotonic() - begin < 60
    [warning] = warnings(caplog)
    assert "W&B is switched off" in warning


@pytest.mark.full  # waits for time limits
def test_a_server_that_falls_silent_later_bounds_the_end(run_folder, server, monkeypatch, caplog):
    process, url = server
    monkeypatch.setenv("WANDB_BASE_URL", url)
    dashboard = open_in(run_folder, "online")
    dashboard._limit = 10
    dashboard._socket.settimeout(10)
    train(dashboard, 1, 3)
    process.send_signal(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        train(dashboard, 4, 500)
        assert time.monotonic() - begin < 8
        dashboard.finish(0)
        assert time.monotonic() - begin < 30
    finally:
        process.send_signal(signal.SIGCONT)
    [warning] = warnings(caplog)
    assert "no answer within 10 s" in warning
    command = shlex.split(warning.partition("can be uploaded later: ")[2])
    assert command[:3] == ["wandb", "sync", "--include-online"]
    subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True, timeout=LIMIT * 2)
    metrics = get(f"{url}/api/v2/runs/{stored_id(run_folder)}/metrics")["metrics_by_key"]
    assert {point["value"] for point in metrics["step"]} == set(range(1, 501))


def test_a_run_that_was_asked_to_stop_has_no_time_for_a_silent_server(run_folder, server, monkeypatch, caplog):
    process, url = server
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setattr("adaptive.tracking.dashboard.PREEMPTED_SECONDS", 2.0)
    dashboard = open_in(run_folder, "online")
    process.send_signal(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        train(dashboard, 1, 3)
        dashboard.finish(1, preempted=True)
        assert time.monotonic() - begin < LIMIT / 2
    finally:
        process.send_signal(signal.SIGCONT)
    [warning] = warnings(caplog)
    assert "no answer within 2 s" in warning


def test_a_client_that_dies_costs_one_warning(run_folder, caplog):
    dashboard = open_in(run_folder, "offline")
    train(dashboard, 1, 2)
    dashboard._process.kill()  # type: ignore[attr-defined]
    dashboard._process.wait()  # type: ignore[attr-defined]
    train(dashboard, 3, 50)
    dashboard.finish(0)
    [warning] = warnings(caplog)
    assert "the client has ended" in warning


def test_a_client_that_raises_costs_one_warning_with_its_cause(run_folder, caplog):
    dashboard = open_in(run_folder, "offline")
    dashboard.image("curves", run_folder / "missing.png")
    dashboard.finish(0)
    train(dashboard, 1, 5)
    [warning] = warnings(caplog)
    assert "missing.png" in warning


def test_without_wandb_there_is_one_warning(run_folder, monkeypatch, tmp_path, caplog):
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "wandb.py").write_text("raise ModuleNotFoundError('No module named wandb')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    dashboard = open_in(run_folder, "online")
    train(dashboard, 1, 5)
    dashboard.finish(0)
    [warning] = warnings(caplog)
    assert "No module named wandb" in warning


def test_a_run_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    dashboard = open_in(tmp_path / "file", "offline")
    train(dashboard, 1, 5)
    dashboard.finish(0)
    assert len(warnings(caplog)) == 1
