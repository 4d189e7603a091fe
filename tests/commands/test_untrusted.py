"""What a run folder, a dataset or an export says is data: it grants no permission, and names no place to write to."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from adaptive.commands.main import main
from adaptive.data.shards.index import fingerprint, load_index
from adaptive.inference.policy import Policy
from tests.helpers.commands import Ended, Forks
from tests.helpers.hostile import OWNED
from tests.helpers.shard_server import serve

pytestmark = pytest.mark.end_to_end

QUICK = ["--device", "cpu", "--workers", "0"]


class Touch:
    """Pickled, a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mknod, (str(self.path),)


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Call a command in this process, in a folder of the test's own; one that fails does so in one line."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))

    def called(*words: str | Path) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Ended(ended.value.code or 0, out, err)

    return called


@pytest.fixture
def run(existing_run: Path, tmp_path: Path) -> Path:
    """A run folder that a test may change."""
    return Path(shutil.copytree(existing_run, tmp_path / "run"))


def says(run: Path, **sections: dict[str, Any]) -> None:
    """Let a run's configuration say something."""
    yaml = YAML(typ="safe")
    tree = yaml.load(run / "config.yaml")
    for name, values in sections.items():
        tree[name] = tree[name] | values if isinstance(values, dict) else values
    yaml.dump(tree, run / "config.yaml")


def readers(run: Path) -> list[list[str]]:
    """The commands that read a run's dataset."""
    return [
        ["evaluate", str(run), "--no-timing", *QUICK],
        ["calibrate", str(run), "--budget", "0.5", *QUICK],
        ["report", str(run), "--wall", "0", *QUICK],
        ["bench", "inference", str(run), "--batch", "1", "--rounds", "1", "--device", "cpu", "--policy", "policy.json"],
    ]


def test_a_run_folder_does_not_allow_its_own_command(run: Path, digits: Path, call: Callable[..., Ended]) -> None:
    says(run, data={"path": f"pipe:touch {OWNED}; cat {digits}/{{}}", "pipe": True})
    Policy(thresholds=[0.5, 0.5, -1.0]).save(Path("policy.json"))
    for words in readers(run):
        line = call(*words).error_line(words[0])
        assert "data.pipe=true" in line
        assert not Path(OWNED).exists(), words
    ended = call("evaluate", run, "data.pipe=true", "--no-timing", *QUICK)
    assert ended.code == 0, ended
    assert Path(OWNED).exists()


@pytest.mark.full
def test_the_user_allows_a_command_for_every_reader(run: Path, digits: Path, call: Callable[..., Ended]) -> None:
    says(run, data={"path": f"pipe:cat {digits}/{{}}"})
    Policy(thresholds=[0.5, 0.5, -1.0]).save(Path("policy.json"))
    for words in readers(run)[1:]:
        assert call(*words, "data.pipe=true").code == 0, words


def test_what_says_nothing_about_a_run_is_refused(run: Path, call: Callable[..., Ended]) -> None:
    assert "data.pipe = 'maybe'" in call("evaluate", run, "data.pipe=maybe").error_line("evaluate")
    line = call("evaluate", run, "train.epochs=3").error_line("evaluate")
    assert "train.epochs" in line
    assert "data.pipe" in line


def test_a_run_folder_names_no_place_to_write_to(
    run: Path, digits: Path, tmp_path: Path, call: Callable[..., Ended]
) -> None:
    with serve(digits) as server:
        says(run, data={"path": server.url, "cache": str(tmp_path / "theirs"), "cache_gib": 1e-9})
        words = ["calibrate", run, "--budget", "0.5", "--method", "geometric", *QUICK]
        assert call(*words).code == 0
        assert not (tmp_path / "theirs").exists()
        assert list((tmp_path / "own-cache").rglob("*.tar"))
        assert call(*words, f"data.cache={tmp_path / 'mine'}").code == 0
    assert list((tmp_path / "mine").rglob("*.tar"))


def test_a_run_folder_names_no_weights_to_load(run: Path, tmp_path: Path, call: Callable[..., Ended]) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(pickle.dumps(Touch(tmp_path / OWNED)))
    says(run, model={"weights": str(weights), "options": {"checkpoint_path": str(weights), "cache_dir": "theirs"}})
    says(run, distillation={"teacher_weights": str(weights)})
    for number in range(2):  # a command that loads the network and reads no data
        assert call("checkpoint", run, "--export-all", f"{number}.safetensors").code == 0
        says(run, model={"weights": None, "pretrained": True, "options": {"pretrained": True}})
    assert not (tmp_path / OWNED).exists()


def test_a_run_folder_extends_no_file(
    run: Path, tmp_path: Path, config_file: Path, call: Callable[..., Ended], forks: Forks
) -> None:
    (tmp_path / "secret.yaml").write_text("password: hunter2\n")
    says(run, extends=str(tmp_path / "secret.yaml"))
    train = forks.start(["train", str(config_file), f"train.run_folder={run}"])
    for words in (["evaluate", run], ["checkpoint", run], ["train"]):
        line = (call(*words) if words[1:] else train.wait()).error_line(str(words[0]))
        assert "extends" in line
        assert "hunter2" not in line
        assert "password" not in line


def test_a_run_folder_does_not_say_whom_results_are_sent_to(run: Path, call: Callable[..., Ended]) -> None:
    says(run, tracking={"wandb": "offline", "entity": "theirs", "project": "of-theirs"})
    line = call("report", run, "--wandb", "--wall", "0", *QUICK).error_line("report")
    assert "tracking.entity=theirs" in line
    assert "tracking.project=of-theirs" in line
    assert not (run / "wandb").exists()


@pytest.mark.full
def test_the_user_says_whom_results_are_sent_to(run: Path, call: Callable[..., Ended]) -> None:
    says(run, tracking={"wandb": "offline", "entity": "theirs", "project": "of-theirs"})
    words = ["tracking.entity=theirs", "tracking.project=of-theirs", "tracking.wandb=offline"]
    assert call("report", run, "--wandb", "--wall", "0", *words, *QUICK).code == 0
    assert list(run.glob("wandb/offline-run-*"))


def test_nothing_is_written_through_links_of_a_run_folder(
    run: Path, tmp_path: Path, call: Callable[..., Ended]
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("evaluation_test.json", "evaluation_test.png", "training.png", "policy.json", "report.html"):
        (outside / name).write_text("mine")
        (run / name).symlink_to(outside / name)
    for words in readers(run)[:2]:
        assert call(*words).code == 0, words
    assert {path.read_text() for path in outside.iterdir()} == {"mine"}
    assert not (run / "evaluation_test.png").is_symlink()
    (run / "figures").symlink_to(outside)
    assert str(run / "figures") in call(*readers(run)[2]).error_line("report")


@pytest.mark.full
def test_a_run_is_not_continued_through_links(
    run: Path, tmp_path: Path, config_file: Path, call: Callable[..., Ended], forks: Forks
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("figures", "wandb", "samples", "submitted", "environment.jsonl", "metrics.jsonl", ".owner"):
        for path in (run / name, outside / name):
            (shutil.rmtree if path.is_dir() else Path.unlink)(path) if path.exists() else None
        (run / name).symlink_to(outside / name)
        if "." not in name:
            (outside / name).mkdir()
    before = sorted(outside.rglob("*"))
    ended = forks.run(["train", str(config_file), f"train.run_folder={run}", "tracking.sample_ids=true"])
    assert "is a link to" in ended.error_line()
    assert "link" in call("submit", config_file, f"train.run_folder={run}", "--cpu").error_line("submit")
    assert sorted(outside.rglob("*")) == before


def test_a_split_is_a_name_and_never_a_path(
    run: Path, digits: Path, tmp_path: Path, call: Callable[..., Ended]
) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(digits, theirs)
    index = load_index(digits)
    splits = {**index.splits, "/../../escaped": index.splits["test"]}
    tree = index.model_copy(update={"splits": splits, "fingerprint": fingerprint(index.classes, splits)})
    (theirs / "index.json").write_text(tree.model_dump_json())
    (run / "evaluation_").mkdir()
    says(run, data={"path": str(theirs), "test_split": "/../../escaped"})
    assert "split" in call("evaluate", run, "--no-timing", *QUICK).error_line("evaluate")
    assert not list(tmp_path.glob("escaped*"))


@pytest.mark.parametrize(
    "change",
    [
        {"classes": [1, 2]},
        {"classes": "0123456789"},
        {"exits": [{"a": 1}]},
        {"exits": ["nowhere"]},
        {"classes": ["a", "b"]},
        {"dataset": 5, "collaboration": "sometimes"},
    ],
    ids=str,
)
def test_a_foreign_checkpoint_ends_in_one_line(run: Path, change: dict[str, Any], call: Callable[..., Ended]) -> None:
    from adaptive.files import file_sha256

    [folder] = (run / "checkpoints").glob("step-*")
    state, manifest = folder / "state.json", folder / "manifest.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | change))
    about = json.loads(manifest.read_text())
    about["files"]["state.json"] = {"bytes": state.stat().st_size, "sha256": file_sha256(state)}
    manifest.write_text(json.dumps(about))
    call("evaluate", run, "--no-timing", *QUICK).error_line("evaluate")


@pytest.mark.full
def test_foreign_records_are_drawn_as_far_as_they_are_numbers(run: Path, call: Callable[..., Ended]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "train/loss": "[red]", "val/exit_1/top1": {"a": []}, "train/exit_x/top1": null}\n')
    assert call("evaluate", run, "--no-timing", *QUICK).code == 0
    found = json.loads((run / "evaluation_test.json").read_text())
    for change in (
        {"budgeted": {"points": [{"cost": "x"}]}},
        {"budgeted": [1]},
        {"milliseconds": {"exits": ["a", "b", "c"], "machine": [], "device": 1, "batch": None}},
        {"checkpoint": ["a"], "weights": {}},
    ):
        (run / "evaluation_test.json").write_text(json.dumps(found | change))
        ended = call("report", run, "--wall", "0", *QUICK)
        assert ended.code == 0, ended
        assert "adaptive evaluate" in ended.out
