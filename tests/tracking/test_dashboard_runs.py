"""Real runs that are killed, stopped, and started again, as W&B's own files show them."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from adaptive.tracking.record import Record, read
from tests.chaos.runs import Life
from tests.tracking.conftest import KEY
from tests.tracking.offline_files import items, of_kind
from tests.tracking.test_dashboard import get

pytest.importorskip("wandb")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.ranks

CONFIG = """
model: {backbone: test_resnet, exits: 2}
data: {path: PATH, image_size: 32, workers: 1}
optimizer: {lr: 0.05}
train: {epochs: 2, global_batch: 64, device: cpu}
evaluate: {batch: 10}
checkpoint: {every_steps: 5, keep: 3}
tracking:
  {every_steps: 1, system_seconds: 0, wandb: offline, group: study, job_type: phase, checkpoints: true, tags: [a]}
"""


def record_one_more(run: Path) -> None:
    """Leave a run as a kill does that comes when a step is recorded, and W&B has not got it yet."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    last = json.loads(lines[-1] if lines[-1].endswith("\n") else lines[-2])
    Record(run / "metrics.jsonl").write({**last, "step": last["step"] + 1})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run that was killed in mid-epoch, then asked to stop, then left to end."""
    folder = tmp_path_factory.mktemp("watched")
    config = folder / "run.yaml"
    config.write_text(CONFIG.replace("PATH", str(digits)))
    for step, number in ((8, signal.SIGKILL), (24, signal.SIGUSR1), (99, None)):
        life = Life(config, folder / "run", 1)
        if number is None:
            life.finish()
            break
        assert life.until(lambda life=life, step=step: life.step >= step), life.tail()
        life.send(number)
        assert life.wait() == [-9 if number == signal.SIGKILL else 75], life.tail()
        if number == signal.SIGKILL:
            record_one_more(folder / "run")
    return folder / "run"


def test_all_starts_are_one_run_and_every_record_is_sent_once(run: Path) -> None:
    opened = of_kind(run, "run")
    assert {record.run_id for record in opened} == {(run / "wandb" / "run_id").read_text().strip()}
    assert {(record.run_group, record.job_type, record.display_name) for record in opened} == {
        ("study", "phase", "run")
    }
    sent = [items(record.item) for record in of_kind(run, "history")]
    rows = {row["_step"]: {key for key in row if not key.startswith("_")} for row in sent}
    assert list(rows) == sorted(rows)  # also over the starts: W&B refuses to go back
    assert len(rows) == len(sent)
    kept: dict[int, set[str]] = {}
    for record in read(run / "metrics.jsonl"):
        if not any(key.startswith("model/") for key in record):
            kept.setdefault(record["step"], set()).update(record)
    assert rows == kept
    summary = [update.key or update.nested_key[0] for record in of_kind(run, "summary") for update in record.update]
    of_the_model = {f"model/exit_{i}/{name}" for i in (1, 2) for name in ("macs", "parameters")}
    assert {key for key in summary if key.startswith("model/")} == of_the_model


def test_a_run_that_began_without_wandb_is_shown_from_its_first_step(tmp_path: Path, digits: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG.replace("PATH", str(digits)).replace("epochs: 2", "epochs: 1"))
    killed = Life(config, tmp_path / "run", 1, "tracking.wandb=disabled")
    assert killed.until(lambda: killed.step >= 8), killed.tail()
    killed.send(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "run" / "wandb").exists()
    Life(config, tmp_path / "run", 1).finish()
    sent = [items(record.item) for record in of_kind(tmp_path / "run", "history")]
    assert [row["_step"] for row in sent] == list(range(1, 21))
    recorded = [r["train/loss"] for r in read(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    assert [row["train/loss"] for row in sent] == recorded
    assert len(of_kind(tmp_path / "run", "summary")) > 0


def test_where_every_start_came_from_is_recorded(run: Path) -> None:
    starts = [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]
    assert len(starts) == 3
    shown = [items(record.config.update)["notes"] for record in of_kind(run, "run")]
    for start, notes in zip(starts, shown, strict=True):
        assert notes | start == notes
        assert set(start["versions"]) == {"torch", "deepspeed", "timm", "webdataset", "wandb", "python"}
        assert set(start["code"]) >= {"commit", "branch", "dirty", "version"}
        assert (start["world"], start["device"]) == (1, "cpu")
        assert notes["dataset"]["images"] == {"train": 1297, "val": 200, "test": 300}
    assert {start["launcher"] for start in starts} <= {"alone", "another"}


def test_the_user_is_told_of_each_end_but_the_good_one(run: Path) -> None:
    killed, stopped = of_kind(run, "alert")
    assert (killed.title, killed.level) == ("the run ended without a word", "INFO")
    assert re.fullmatch(rf"{re.escape(str(run))} was asked to stop at step (2[4-9]|3\d)", stopped.title)
    assert stopped.level == "WARN"
    assert "the same command continues" in stopped.text or "saved in" in stopped.text
    assert len(of_kind(run, "preempting")) == 1
    assert [record.exit_code for record in of_kind(run, "exit")] == [1, 1, 0]


def test_checkpoints_are_references_with_their_merits(run: Path) -> None:
    shown = of_kind(run, "artifact")
    assert {record.name for record in shown} == {f"{(run / 'wandb' / 'run_id').read_text().strip()}-checkpoint"}
    steps = [next(alias for alias in record.aliases if alias.startswith("step-")) for record in shown]
    assert steps[-1] == "step-40"
    assert len(steps) >= 6
    assert len(set(steps)) >= len(steps) - 1
    for record in shown:
        assert "latest" in record.aliases
        assert record.type == "model"
        (step,) = [int(alias.removeprefix("step-")) for alias in record.aliases if alias.startswith("step-")]
        folder = f"file://{run}/checkpoints/step-{step:08d}/"
        names = {"weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
        assert names <= {entry.ref.removeprefix(folder) for entry in record.manifest.contents}
    scored = [record for record in shown if json.loads(record.metadata)["score"] is not None]
    assert scored
    assert "best" in scored[0].aliases


@pytest.mark.browser
@pytest.mark.full
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_server_shows_a_killed_run_as_one_with_every_step_once(
    tmp_path: Path,
    digits: Path,
    server,
) -> None:
    _, url = server
    config = tmp_path / "run.yaml"
    config.write_text(
        CONFIG.replace("PATH", str(digits)).replace("offline", "online").replace("epochs: 2", "epochs: 1")
    )
    environment = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}
    killed = Life(config, tmp_path / "run", 1, environment=environment)
    assert killed.until(lambda: killed.step >= 8), killed.tail()
    killed.send(signal.SIGKILL)
    killed.wait()
    Life(config, tmp_path / "run", 1, environment=environment).finish()
    number = (tmp_path / "run" / "wandb" / "run_id").read_text().strip()
    runs = get(f"{url}/api/v2/projects/default/adaptive/runs")["runs"]
    assert [(run["run_id"], run["state"]) for run in runs] == [(number, "finished")]
    shown = get(f"{url}/api/v2/runs/{number}/metrics")["metrics_by_key"]
    assert [point["step"] for point in shown["train/loss"]] == list(range(1, 21))
    recorded = [r["train/loss"] for r in read(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    assert [point["value"] for point in shown["train/loss"]] == recorded

    trouble: list[str] = []
    with pytest.importorskip("playwright.sync_api").sync_playwright() as player:
        page = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.goto(f"{url}/login")
        page.fill("input[placeholder='Enter username']", "admin")
        page.fill("input[placeholder='Enter password']", "admin123")
        page.locator("button:has-text('Login')").last.click()
        page.wait_for_url(f"{url}/")
        page.goto(f"{url}/runs/default/adaptive/{number}")
        page.wait_for_function("document.querySelectorAll('canvas').length >= 20")
        text = page.inner_text("body")
    assert "Run ID: " + number in text
    assert all(name in text for name in ("exit_1/top1", "gradient_norm/block_2", "images_per_second"))
    assert trouble == []
