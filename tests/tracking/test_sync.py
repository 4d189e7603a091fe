"""Upload of offline runs by the real client, to a server on this machine that is then asked what it has."""

import json
import time
from pathlib import Path

import pytest

from adaptive.errors import MachineError
from adaptive.tracking.sync import entities, in_progress, mend, offline_starts, sync
from adaptive.tracking.wandb_server import run_client
from adaptive.training.preflight import occupy
from tests.helpers.shard_server import serve
from tests.tracking.conftest import KEY
from tests.tracking.offline_files import records
from tests.tracking.test_dashboard import get, open_in, stored_id, train
from tests.tracking.test_workspace import call

pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("isolated")


def record(folder: Path, *starts: tuple[int, int]) -> str:
    """Record steps offline, start after start; returns the run's id."""
    for i, (first, last) in enumerate(starts):
        if i:
            time.sleep(1.1)  # W&B names the folders by the second
        dashboard = open_in(folder, "offline", project="exits", name=folder.name)
        train(dashboard, first, last)
        dashboard.finish(0)
    return stored_id(folder)


@pytest.mark.full  # online: test_dashboard_runs.py
def test_all_starts_become_one_run(run_folder, tmp_path, server, monkeypatch, capsys):
    _, url = server
    second = tmp_path / "second"
    second.mkdir()
    ids = [record(run_folder, (1, 3), (4, 6)), record(second, (1, 2))]
    monkeypatch.setenv("WANDB_BASE_URL", url)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ended = call(capsys, "--sync", str(run_folder), str(second))
    assert list(Path().iterdir()) == []
    assert ended.code == 0, ended
    assert ended.out.splitlines() == [
        f"{run_folder}: 2 starts uploaded (W&B run {ids[0]})",
        f"{second}: 1 start uploaded (W&B run {ids[1]})",
    ]
    runs = get(f"{url}/api/v2/projects/default/exits/runs")["runs"]
    assert sorted(run["run_id"] for run in runs) == sorted(ids)
    metrics = get(f"{url}/api/v2/runs/{ids[0]}/metrics")["metrics_by_key"]
    # W&B's own counter begins anew with every offline start, and this server sorts by it; `step` is the axis.
    assert sorted(point["value"] for point in metrics["step"]) == [1, 2, 3, 4, 5, 6]
    assert sorted(point["value"] for point in metrics["val/exit_1/top1"]) == [10.0 * step for step in range(1, 7)]

    time.sleep(1.1)
    record(run_folder, (7, 8))
    assert (
        call(capsys, "--sync", str(run_folder)).out == f"{run_folder}: 1 start uploaded, 2 before (W&B run {ids[0]})\n"
    )
    metrics = get(f"{url}/api/v2/runs/{ids[0]}/metrics")["metrics_by_key"]
    assert sorted(point["value"] for point in metrics["step"]) == [1, 2, 3, 4, 5, 6, 7, 8]

    again = call(capsys, "--sync", str(run_folder), "--json")
    assert again.code == 0
    assert json.loads(again.out)["runs"] == [
        {"run": str(run_folder), "id": ids[0], "starts": 0, "before": 3, "empty": 0, "fault": ""}
    ]


@pytest.mark.full
def test_starts_that_were_killed_do_not_keep_the_others_back(run_folder, server, monkeypatch, capsys):
    _, url = server
    number = record(run_folder, (1, 3), (4, 5), (6, 8))
    torn, empty, _ = offline_starts(run_folder)
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-30])  # in the midst of a record
    empty.write_bytes(b"")  # before the client wrote anything
    monkeypatch.setenv("WANDB_BASE_URL", url)
    ended = call(capsys, "--sync", str(run_folder))
    assert (ended.code, ended.out) == (0, f"{run_folder}: 2 starts uploaded, 1 empty (W&B run {number})\n")
    metrics = get(f"{url}/api/v2/runs/{number}/metrics")["metrics_by_key"]
    assert {point["value"] for point in metrics["step"]} == {1, 2, 3, 6, 7, 8}
    assert (
        call(capsys, "--sync", str(run_folder)).out
        == f"{run_folder}: 0 starts uploaded, 2 before, 1 empty (W&B run {number})\n"
    )


def test_mending_keeps_every_whole_record(run_folder):
    dashboard = open_in(run_folder, "offline")
    dashboard.summary({"long": "x" * 70_000})  # a record over three blocks
    train(dashboard, 1, 3)
    dashboard.finish(0)
    [file] = offline_starts(run_folder)
    whole, everything = file.read_bytes(), records(file)
    assert mend(file)
    assert file.read_bytes() == whole
    seen = set()
    for length in {0, 3, 7, 20, *range(8, len(whole), 97), len(whole) - 1}:
        file.write_bytes(whole[:length])
        before = records(file)
        assert mend(file) == (len(before) > 1)
        assert records(file) == before == everything[: len(before)]
        content = file.read_bytes()
        assert whole.startswith(content)
        file.write_bytes(content + whole[len(content) :])  # cut at the end of a record: what followed fits on
        assert records(file) == everything
        seen.add(len(before))
    assert len(seen) > 10


def test_one_that_fails_is_told_and_the_others_go_on(run_folder, tmp_path, server, monkeypatch, capsys):
    _, url = server
    broken = tmp_path / "broken"
    broken.mkdir()
    for folder in (broken, run_folder):
        record(folder, (1, 2))
    [log] = offline_starts(broken)
    log.write_bytes(b"no log of W&B's")
    monkeypatch.setenv("WANDB_BASE_URL", url)
    ended = call(capsys, "--sync", str(broken), str(run_folder), "--timeout", "240")
    assert ended.code == 1
    bad, good = ended.out.splitlines()
    assert bad.startswith(f"{broken}: not uploaded: 1 of 1 starts, the first offline-run-")
    assert good == f"{run_folder}: 1 start uploaded (W&B run {stored_id(run_folder)})"


def test_the_time_limit_holds(run_folder, server, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", server[1])
    record(run_folder, (1, 1))
    found = sync(run_folder, 0.01)
    assert found.fault == "not done within 0.01 s; give more with --timeout"
    assert found.summary.startswith(f"{run_folder}: not uploaded: ")


def test_a_run_in_progress_waits(run_folder):
    record(run_folder, (1, 1))
    with occupy(run_folder):
        assert "being trained" in sync(run_folder, 60).fault
        assert [file.suffix for file in offline_starts(run_folder)[0].parent.glob("run-*")] == [".wandb"]
    assert not in_progress(run_folder)


def test_nothing_to_upload_is_refused(run_folder, tmp_path, capsys):
    with pytest.raises(MachineError, match=r"holds no wandb/offline-run-\* folders; give run folders .*wandb=offline"):
        offline_starts(run_folder)
    ended = call(capsys, "--sync", str(tmp_path / "missing"))
    assert ended.code == 1
    assert "missing is no folder" in ended.err


def test_no_login_is_refused(run_folder, monkeypatch, capsys):
    record(run_folder, (1, 1))
    monkeypatch.delenv("WANDB_API_KEY")
    ended = call(capsys, "--sync", str(run_folder))
    assert ended.code == 1
    assert "no W&B login for 127.0.0.1:" in ended.err
    assert KEY not in ended.err


def test_the_client_takes_no_module_from_where_it_is_called(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text("raise SystemExit('theirs')")
    monkeypatch.chdir(tmp_path)
    for folder in (None, str(tmp_path)):
        ended = run_client(["-c", "import wandb; print(wandb.__version__)"], 60.0, folder=folder)
        assert (ended.code, ended.err) == (0, "")


def test_nothing_outside_of_the_run_folder_is_uploaded(tmp_path):
    start = tmp_path / "run" / "wandb" / "offline-run-20260101_000000-abc"
    (start / "files").mkdir(parents=True)
    (start / "run-abc.wandb").write_bytes(b":W&B")
    (tmp_path / "secret").write_text("mine")
    (start / "files" / "inside").symlink_to("../run-abc.wandb")
    assert offline_starts(tmp_path / "run") == [start / "run-abc.wandb"]
    (start / "files" / "output.log").symlink_to(tmp_path / "secret")
    with pytest.raises(MachineError, match=r"output\.log is a link to .*secret"):
        offline_starts(tmp_path / "run")


@pytest.mark.full
def test_a_run_folder_does_not_say_which_server_gets_the_key(run_folder, tmp_path, monkeypatch):
    record(run_folder, (1, 2))
    monkeypatch.chdir(run_folder)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "mine"))
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    (tmp_path / "mine").mkdir()
    with serve(tmp_path) as mine, serve(tmp_path) as theirs:
        for folder, server in ((tmp_path / "mine", mine), (run_folder / "wandb", theirs)):
            (folder / "settings").write_text(f"[default]\nbase_url = {server.url.removesuffix('/data')}\n")
        assert sync(run_folder, 20.0).fault
        assert theirs.requests == []
        assert mine.requests


def test_a_run_folder_does_not_say_which_team_gets_it(run_folder, monkeypatch, capsys):
    dashboard = open_in(run_folder, "offline", project="exits", entity="theirs")
    train(dashboard, 1, 2)
    dashboard.finish(0)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    assert entities([run_folder], 60.0) == {str(run_folder): {"theirs"}}
    assert "--entity theirs" in call(capsys, "--sync", str(run_folder)).err
    for words in (["--entity", "mine"], ["--entity", "theirs"]):
        assert "does not answer" in call(capsys, "--sync", str(run_folder), *words, "--timeout", "5").err
