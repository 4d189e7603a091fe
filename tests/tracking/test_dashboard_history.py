"""What reaches the client's files whatever happens: rows at closed steps, rows of a killed job, no secrets."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from adaptive.config.sections import TrackingConfig
from adaptive.foreign_text import without_secrets
from adaptive.tracking.dashboard import open_dashboard
from adaptive.tracking.wandb_client import History
from tests.tracking.offline_files import items, of_kind
from tests.tracking.test_dashboard import LIMIT, open_in, train, warnings

pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("isolated")


def rows(run_folder) -> list[dict[str, Any]]:
    return [items(record.item) for record in of_kind(run_folder, "history")]


def test_a_record_at_a_step_that_a_picture_has_closed_is_kept(run_folder):
    Image.new("RGB", (4, 4)).save(run_folder / "curves.png")
    dashboard = open_in(run_folder, "offline")
    dashboard.log({"train/loss": 1.0}, 5)
    dashboard.image("curves", run_folder / "curves.png")
    dashboard.log({"val/loss": 2.0}, 5)
    dashboard.log({"train/loss": 3.0}, 7)
    dashboard.log({"val/loss": 4.0}, 7)
    dashboard.finish()
    kept = [
        {k: v for k, v in row.items() if k in ("_step", "step", "train/loss", "val/loss")} for row in rows(run_folder)
    ]
    assert kept == [
        {"_step": 5, "step": 5, "train/loss": 1.0},
        {"_step": 6, "step": 5, "val/loss": 2.0},
        {"_step": 7, "step": 7, "train/loss": 3.0, "val/loss": 4.0},
    ]


def test_what_a_stopped_run_owes_to_its_last_step_is_not_refused_by_the_server(tmp_path):
    # The server on this machine continues no history, so the client's answer to one that does stands in for it.
    sent: list[tuple[int, int, bool]] = []
    run = SimpleNamespace(
        starting_step=21, log=lambda content, step, commit: sent.append((content["step"], step, commit))
    )
    history = History(run, tmp_path / "shown.json")  # type: ignore[arg-type]
    assert history.shown == {"step": 20, "records": []}  # as the server says, where no start has left its own word
    for step in (20, 21, 22, 40):
        history.record({"step": step})
    assert sent == [(20, 21, True), (21, 22, True), (22, 23, True), (40, 40, False)]


def test_every_start_knows_what_all_earlier_ones_have_sent(run_folder):
    first = open_in(run_folder, "offline")
    assert not first.shown.has({"step": 0})
    for step in (1, 2):
        first.log({"step": step, "train/loss": 1.0}, step)
    first.log({"step": 2, "val/loss": 1.0}, 2)
    first.finish(1)
    open_in(run_folder, "offline").finish(1)  # a start that came to nothing forgets nothing
    second = open_in(run_folder, "offline")
    assert second.shown.has({"step": 1, "train/loss": 3.0})
    assert second.shown.has({"step": 2, "train/loss": 3.0})
    assert second.shown.has({"step": 2, "val/loss": 3.0})
    assert not second.shown.has({"step": 2, "val_ema/loss": 3.0})
    assert not second.shown.has({"step": 3, "train/loss": 3.0})
    second.finish()
    (run_folder / "wandb" / "shown.json").write_text("")  # as a power loss may leave it
    third = open_in(run_folder, "offline")
    assert not third.shown.has({"step": 1, "train/loss": 3.0})
    third.finish()


def test_what_a_job_recorded_is_on_disk_when_all_of_it_is_killed(run_folder):
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, str(run_folder)], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    try:
        assert job.stdout is not None
        client = int(job.stdout.readline())
        until = time.monotonic() + 10  # the client's own interval is 15 s
        while not [row for row in _rows_so_far(run_folder) if row.get("step") == 3]:
            assert time.monotonic() < until
            time.sleep(0.1)
    finally:
        os.killpg(client, signal.SIGKILL)  # with W&B's service
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    assert [row["step"] for row in rows(run_folder)] == [1, 2, 3]


JOB = """
import sys, time
from pathlib import Path
from adaptive.config.sections import TrackingConfig
from adaptive.tracking.dashboard import open_dashboard
dashboard = open_dashboard(TrackingConfig(wandb="offline"), Path(sys.argv[1]), {}, {})
print(dashboard._process.pid, flush=True)
for step in (1, 2, 3, 4):  # a row is complete when the next step begins
    dashboard.log({"train/loss": 1.0}, step)
time.sleep(600)
"""


def _rows_so_far(run_folder) -> list[dict[str, Any]]:
    return rows(run_folder) if list(run_folder.glob("wandb/offline-run-*/*.wandb")) else []


def test_a_checkpoint_that_is_gone_already_costs_nothing(run_folder, caplog):
    dashboard = open_in(run_folder, "offline", checkpoints=True)
    dashboard.checkpoint(run_folder / "checkpoints" / "step-00000001", ["latest"], {"step": 1})
    train(dashboard, 1, 2)
    dashboard.finish()
    assert [row["step"] for row in rows(run_folder)] == [1, 2]
    assert of_kind(run_folder, "artifact") == []
    [hint] = warnings(caplog)
    assert "to upload this run" in hint


def test_secrets_of_urls_and_commands_are_not_sent(run_folder):
    config = {
        "data": {"path": "https://me:pa55word@host/set?X-Amz-Signature=f00d#x", "val_split": "val", "workers": 2},
        "model": {"weights": "s3://bucket/file", "exits": ["layer1", "layer2"]},
    }
    shown = without_secrets(config)
    assert shown["data"] == {"path": "https://***@host/set?***", "val_split": "val", "workers": 2}
    assert shown["model"] == config["model"]
    notes = {"dataset": {"path": "pipe:curl -H 'Authorization: Bearer c0ffee' {}"}}
    assert without_secrets(notes) == {"dataset": {"path": "pipe:***"}}
    tracking = TrackingConfig(wandb="offline", init_timeout=LIMIT)
    open_dashboard(tracking, run_folder, config, notes).finish()
    files = [path.read_bytes() for path in run_folder.rglob("*") if path.is_file()]
    assert any(b"https://***@host/set" in content for content in files)
    for secret in (b"pa55word", b"f00d", b"c0ffee"):
        assert not any(secret in content for content in files)
