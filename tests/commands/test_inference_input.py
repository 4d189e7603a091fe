"""Commands on trained networks: what is broken is refused in the same words, answers are kept, JSON stays JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from PIL import Image

from adaptive.commands.main import main
from adaptive.errors import AdaptiveError
from adaptive.inference.policy import EVERYBODY, NOBODY, Policy
from adaptive.runs import TrainedRun, load
from adaptive.training.checkpoints.store import CheckpointStore
from tests.helpers.commands import Forks

BROKEN = " is NaN or infinite: its weights or its precision are broken; adaptive evaluate RUN counts such answers"


def strict(text: str) -> Any:
    """JSON as the standard has it: Python's own reader takes NaN, most others do not."""

    def refuse(word: str) -> NoReturn:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def trained(existing_run: Path) -> TrainedRun:
    return load(existing_run)


def remade(trained: TrainedRun, folder: Path, change: str) -> Path:
    """A copy of the run, one of whose weights is no number."""
    shutil.copytree(trained.folder, folder)
    weights = trained.checkpoint.tensors("weights")
    weights[change] = torch.full_like(weights[change], float("nan"))
    store = CheckpointStore(folder / "checkpoints")
    [only] = store.all()
    store.save(only.step, {"weights": weights}, only.state(), only.score, only.phase, only.epoch)
    return folder


@pytest.fixture(scope="module")
def broken(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose last exit answers NaN to everything; images that its policy lets go early are answered."""
    name = next(name for name in trained.checkpoint.tensors("weights") if name.startswith("exits.2") and "fc" in name)
    folder = remade(trained, tmp_path_factory.mktemp("broken") / "run", name)
    Policy(thresholds=[NOBODY, NOBODY, EVERYBODY]).save(folder / "policy.json")
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("images") / "one.png"
    Image.new("RGB", (40, 40), (200, 30, 30)).save(file)
    return str(file)


@pytest.mark.parametrize(
    ("words", "answers"),
    [
        (["predict", "RUN", "IMAGE"], "image 0 (from 0)"),
        (["predict", "RUN", "IMAGE", "--json"], "image 0 (from 0)"),
        (["calibrate", "RUN", "--budget", "0.5", "--workers", "0", "--out", "OUT"], "images 0, 1, 2 and "),
        (["bench", "inference", "RUN", "--rounds", "1", "--batch", "2"], "images 0, 1 (from 0)"),
        (["report", "RUN", "--workers", "0", "--out", "OUT"], "images 0, 1, 2 and "),
        (["export", "RUN", "OUT"], "image 0 (from 0)"),
    ],
    ids=lambda value: value[0] + value[-1] if isinstance(value, list) else "",
)
def test_a_broken_network_is_refused_in_the_same_words(
    words: list[str], answers: str, broken: Path, image: str, forks: Forks, tmp_path: Path
) -> None:
    given = {"RUN": str(broken), "IMAGE": image, "OUT": str(tmp_path / "out")}
    ended = forks.run([given.get(word, word) for word in words])
    line = ended.error_line(words[0])
    assert f"the network's answer to {answers}" in line
    assert BROKEN in line
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


def test_evaluate_counts_what_is_broken(broken: Path, forks: Forks, tmp_path: Path) -> None:
    copy = shutil.copytree(broken, tmp_path / "a $run$")  # which no figure's title takes for mathematics
    words = ["evaluate", str(copy), "--workers", "0", "--no-timing"]
    ended = forks.run([*words, "--json"])
    assert ended.code == 0
    assert len(ended.err.splitlines()) == 1
    assert (
        f"no policies were measured: the network's answer to images 0, 1, 2 and 297 more (from 0){BROKEN}" in ended.err
    )
    result = strict(ended.out)
    assert strict((copy / "evaluation_test.json").read_text()) == result
    assert [entry["not_finite"] for entry in result["exits"]] == [0, 0, 300]
    assert [(entry["top1"], entry["top5"], entry["loss"]) for entry in result["exits"]][2] == (0, 0, None)
    assert result["exits"][0]["top5"] > 0
    assert result["budgeted"] is None
    assert (copy / "evaluation_test.png").is_file()
    ended = forks.run(words)
    assert "exit 3: 300 of 300 answers are NaN or infinite, and count as wrong" in ended.out


def test_images_that_leave_before_the_broken_exit_are_answered(
    broken: Path, trained: TrainedRun, forks: Forks, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i, colour in enumerate([(255, 255, 255), (0, 0, 0), (90, 200, 10), (10, 20, 250)]):
        Image.new("RGB", (32, 32), colour).save(images / f"{i}.png")
    files = sorted(images.glob("*.png"))
    with torch.no_grad():
        batch = torch.stack([trained.transform(Image.open(file)) for file in files])
        sure = trained.network(batch)[0].softmax(1).amax(1)
    middle = float(sure.sort().values[1:3].mean())
    Policy(thresholds=[middle, NOBODY, EVERYBODY]).save(tmp_path / "policy.json")
    ended = forks.run(["predict", str(broken), str(images), "--policy", str(tmp_path / "policy.json"), "--json"])
    assert ended.code == 1
    rows = [strict(line) for line in ended.out.splitlines()]
    assert [row["image"] for row in rows] == [str(f) for f, s in zip(files, sure, strict=True) if s >= middle]
    lines = ended.err.splitlines()
    assert [line.split(": ")[2] for line in lines] == [str(f) for f, s in zip(files, sure, strict=True) if s < middle]
    assert all(BROKEN in line for line in lines)


def test_every_command_refuses_the_same_policies_in_the_words_of_the_runners(
    trained: TrainedRun, image: str, forks: Forks, tmp_path: Path
) -> None:
    run = str(trained.folder)
    own = trained.identity
    other = own.model_copy(update={"fingerprint": "0" * 64})
    Policy(thresholds=[0.5, 0.0]).save(tmp_path / "fewer.json")
    Policy(thresholds=[0.5, 0.5, 0.0], network=other).save(tmp_path / "other.json")
    expected = {
        "fewer": f" is for 2 exits, {run}'s step-00000001 has 3; calibrate: adaptive calibrate {run} --budget 0.5",
        "other": f" was calibrated for other weights (test_resnet, fingerprint 000000000000) than those of {run}'s "
        f"step-00000001 (fingerprint {own.fingerprint[:12]}); calibrate: adaptive calibrate {run} --budget 0.5",
    }
    for name, words in expected.items():
        policy = str(tmp_path / f"{name}.json")
        for command in (["predict", run, image], ["bench", "inference", run], ["report", run], ["export", run, "x"]):
            line = forks.run([*command, "--policy", policy]).error_line(command[0])
            assert line == f"adaptive {command[0]}: error: policy {policy}{words}"


class TestAnswersAreKept:
    """What was computed is shown, whatever happens at the end."""

    def test_names_are_printed_as_they_are(self, trained: TrainedRun, forks: Forks, tmp_path: Path) -> None:
        """Brackets are no markup, and bytes of another encoding no reason to lose the table."""
        folder = tmp_path / "odd [red]"
        (folder / "a[").mkdir(parents=True)
        for name in ("a[/b].png", ":smile:.png", os.fsdecode(b"\xff\xe4.png")):
            Image.new("RGB", (32, 32)).save(folder / name)
        ended = forks.run(["predict", str(trained.folder), str(folder)])
        assert ended.code == 0, ended
        shown = "".join(ended.out.split())
        for name in ("odd[red]/a[/b].png", "/:smile:.png", r"\udcff\udce4.png"):
            assert name in shown
        assert "3 images" in ended.out

    def test_what_was_answered_before_a_failure(
        self, trained: TrainedRun, image: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        from adaptive.commands import predict
        from adaptive.commands.main import main

        answered = 0

        def fail(tensors: list[Any]) -> tuple[list[int], list[list[float]]]:
            nonlocal answered
            answered += 1
            if answered == 3:  # the first call sets up
                raise AdaptiveError("the device is gone")
            return [1], [[0.25, 0.75]]

        opened = predict.Model(["cat", "dog"], lambda file: file.open(), fail, 3)
        monkeypatch.setattr(predict, "open_run", lambda arguments: opened)
        with pytest.raises(SystemExit) as ended:
            main(["predict", str(trained.folder), image, image, "--batch", "1"])
        told = capsys.readouterr()
        assert ended.value.code == 1
        assert "dog" in told.out
        assert "the device is gone" in told.err


@pytest.mark.full  # a run of its own; tests/reporting draws such runs
class TestOneExit:
    """A plain network has nothing to calibrate, and no command says that it should be."""

    @pytest.fixture(scope="class")
    def plain(self, config_file: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> str:
        folder = tmp_path_factory.mktemp("plain") / "run"
        ended = forks.run(["train", str(config_file), f"train.run_folder={folder}", "model.exits=1"])
        assert ended.code == 0, ended
        return str(folder)

    def test_every_command_goes_without_a_policy(self, plain: str, image: str, forks: Forks, tmp_path: Path) -> None:
        page = tmp_path / "page.html"
        for words in (
            ["predict", plain, image],
            ["bench", "inference", plain, "--rounds", "1", "--batch", "1"],
            ["evaluate", plain, "--workers", "0"],
            ["report", plain, "--workers", "0", "--out", str(page)],
        ):
            ended = forks.run(words)
            assert (ended.code, ended.err) == (0, ""), words
            assert "calibrate" not in ended.out, words
        text = page.read_text()
        assert "adaptive calibrate" not in text
        assert "adaptive evaluate" not in text
        assert "One exit, where everybody leaves." in text

    @pytest.mark.full
    def test_it_is_exported_without_a_policy(self, plain: str, forks: Forks, tmp_path: Path) -> None:
        ended = forks.run(["export", plain, str(tmp_path / "export"), "--formats", "torch"])
        assert (ended.code, ended.err) == (0, "")

    def test_calibrate_and_others_policies_say_so(self, plain: str, image: str, forks: Forks, tmp_path: Path) -> None:
        for given in (["--budget", "0.5"], ["--budget", "1"], ["--max-loss", "1"]):
            line = forks.run(["calibrate", plain, *given]).error_line("calibrate")
            assert f"{plain} has one exit, where everybody leaves: there is nothing to calibrate" in line
            assert f"adaptive train {plain}/config.yaml model.exits=4 train.run_folder={plain}-exits; then" in line
            assert f"compare: adaptive bench inference {plain} {plain}-exits" in line
        policy = tmp_path / "policy.json"
        Policy(thresholds=[0.5, 0.5, 0.0]).save(policy)
        line = forks.run(["predict", plain, image, "--policy", str(policy)]).error_line("predict")
        assert "is for 3 exits" in line
        assert "nobody can leave early: leave the policy out" in line

    def test_what_calibrate_advises_works(self, plain: str, forks: Forks) -> None:
        line = forks.run(["calibrate", plain, "--budget", "0.5"]).error_line("calibrate")
        train, compare = re.findall(r"adaptive (train [^;]+|bench [^;]+)", line)
        for words in (
            train.split(),
            ["calibrate", f"{plain}-exits", "--budget", "0.9", "--workers", "0"],
            [*compare.split(), "--rounds", "1", "--batch", "2", "--images", "8", "--threads", "1", "--json"],
        ):
            ended = forks.run(words)
            assert ended.code == 0, (words, ended)
        assert [row["part"] for row in json.loads(ended.out)["rows"]] == ["full", "policy", "full"]

    def test_what_the_report_advises_works(self, plain: str, forks: Forks, tmp_path: Path) -> None:
        """On the split that is shown, and of a network that has no policies to draw."""
        words = ["report", plain, "--workers", "0", "--split", "val", "--out", str(tmp_path / "page.html")]
        [advice] = re.findall(r"adaptive (evaluate .*)", forks.run(words).out)
        assert forks.run([*advice.split(), "--workers", "0"]).code == 0
        told = forks.run(words).out
        assert "adaptive evaluate" not in told
        assert "adaptive evaluate" not in (tmp_path / "page.html").read_text()

    def test_a_policy_beside_it_is_to_be_removed(self, plain: str, image: str, forks: Forks, tmp_path: Path) -> None:
        copy = tmp_path / "copy"
        shutil.copytree(plain, copy)
        own = copy / "policy.json"
        for content in ("{}", Policy(thresholds=[0.5, 0.0]).model_dump_json()):
            own.write_text(content)
            for words in (["predict", str(copy), image], ["bench", "inference", str(copy)], ["report", str(copy)]):
                line = forks.run(words).error_line(words[0])
                assert "leave the policy out (remove a policy.json)" in line
                assert "adaptive calibrate" not in line
        own.unlink()
        assert forks.run(["predict", str(copy), image]).code == 0


def test_calibrate_shows_small_thresholds_and_remarks_on_temperatures_at_their_bound(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from adaptive.commands.calibrate import _print

    policy = Policy(thresholds=[3.2e-6, 0.25, EVERYBODY], temperatures=[20.0, 1.5, 0.05])
    record = {"target": {"budget": 1.0}, "unit": "MACs", "method": "search"}
    result = {"calibration": record, "images": 9, "split": "val", "shares": [0.5, 0.25, 0.25], "left_out": {}}
    _print({**result, "macs": 1, "macs_full": 2, "top1": 50.0, "top1_full": 60.0, "policy": "p", "run": "r"}, policy)
    shown = capsys.readouterr().out
    assert "3.2e-06" in shown
    assert "0.2500" in shown
    assert "temperature of exit 1, 3 at its bound (0.05 to 20)" in shown


def told(words: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--workers", "0", "--json"])
    assert ended.value.code == 0
    return strict(capsys.readouterr().out)


@pytest.mark.full
def test_figures_of_images_that_chose_are_marked(
    existing_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same dataset and split: its val chose the checkpoint, and a policy where one was calibrated on it."""
    run = shutil.copytree(existing_run, tmp_path / "run")
    evaluate = ["evaluate", str(run), "--no-timing", "--policy-split", "val"]
    before = told([*evaluate, "--split", "val"], capsys)
    assert (before["in_sample"], before["chose"]) == (True, ["checkpoint"])
    policy = told(["calibrate", str(run), "--budget", "0.8", "--method", "geometric"], capsys)
    assert policy["in_sample"] is True
    assert policy["calibration"]["seen"]["cells"]
    assert Policy.load(run / "policy.json").calibration.dataset == load(run).dataset  # type: ignore[union-attr]
    for split, step, chose in (
        ("val", "best", ["checkpoint", "policy"]),
        ("val", "last", ["policy"]),
        ("test", "best", []),
    ):
        found = told([*evaluate, "--split", split, "--checkpoint", step], capsys)
        assert (found["in_sample"], found["chose"]) == (bool(chose), chose)
    out = str(tmp_path / "report.html")
    for split, marked in (("val", True), ("test", False)):
        page = told(["report", str(run), "--split", split, "--wall", "0", "--out", out], capsys)
        assert page["runs"][0]["in_sample"] is marked
        mark = "<mark>in-sample: these images chose the checkpoint and the policy</mark>"
        assert (mark in Path(out).read_text()) is marked
