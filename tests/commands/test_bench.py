"""`adaptive bench inference`: runs, plain ones and exports in one table; what cannot be compared is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adaptive.commands.main import main
from adaptive.data.packing.pack import pack
from adaptive.inference.policy import EVERYBODY, Policy
from adaptive.runs import collect_outputs, load
from tests.helpers.commands import Forks

QUICK = ["--device", "cpu", "--threads", "1", "--rounds", "2"]


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "inference", *words])
    told = capsys.readouterr()
    assert ended.value.code in (1, 2)
    assert told.out == ""
    return told.err


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like runs and exports from outside; nothing in it is read before the options are."""
    for name, file in (("run", "config.yaml"), ("other", "config.yaml"), ("deploy", "manifest.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("damaged")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--runtime", "nothing"], "invalid choice: 'nothing' (choose from"),
        (["run", "--threads", "0"], "--threads 0 is too small; give 1 or more"),
        (["run", "--images", "0"], "--images 0 is too small; give 1 or more"),
        (["run", "--rounds", "-1"], "--rounds -1 is too small; give 1 or more"),
        (["run", "--batch", "4", "0"], "--batch 0 is too small; give 1 or more"),
        (["run", "empty"], "empty is neither a run folder (it has no config.yaml) nor an export (no manifest.json)"),
        (["nowhere"], "nowhere is neither a run folder"),
        (["data.pipe=true"], "TARGET missing"),
        (["run", "other", "--policy", "p"], "--policy p: a policy belongs to one network, and 2 targets are given"),
        (["run", "--accelerate", "compile"], "goes with --blocks; whole networks are compared by --runtime compile"),
        (["run", "other", "--blocks"], "--blocks takes one run folder"),
        (["deploy", "--blocks"], "--blocks takes one run folder"),
        (["run", "--blocks", "--runtime", "onnx"], "goes without --blocks"),
        (["deploy", "--runtime", "compile"], "deploy is an export, which onnxruntime runs; give its run folder"),
        (["deploy", "--precision", "bf16"], "--precision bf16: onnxruntime computes in fp32 here; leave it out"),
        (["run", "--runtime", "onnx", "--precision", "fp16"], "--precision fp16: onnxruntime computes in fp32"),
        (["deploy"], "deploy/manifest.json is not JSON"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, *words)


@pytest.mark.full
class TestTogether:
    """A run, a plain one and an export of the first, from one dataset."""

    @pytest.fixture(scope="class")
    def places(
        self, config_file: Path, existing_run: Path, forks: Forks, tmp_path_factory: pytest.TempPathFactory
    ) -> Path:
        root = tmp_path_factory.mktemp("together")
        shutil.copytree(existing_run, root / "adaptive")
        shutil.copytree(existing_run, root / "without")
        outputs = collect_outputs(load(existing_run), "test", workers=0)
        half, also = outputs.logits[:2].softmax(-1).amax(-1).median(dim=1).values.tolist()
        Policy(thresholds=[half, also, EVERYBODY]).save(root / "adaptive/policy.json")
        for words in (
            ["train", str(config_file), f"train.run_folder={root / 'plain'}", "model.exits=1"],
            ["export", str(root / "adaptive"), str(root / "deploy"), "--formats", "onnx"],
        ):
            ended = forks.run(words)
            assert ended.code == 0, ended
        return root

    @staticmethod
    def rows(forks: Forks, *words: Any) -> tuple[dict[str, Any], str]:
        ended = forks.run(["bench", "inference", *map(str, words), *QUICK, "--json"])
        assert ended.code == 0, ended
        return json.loads(ended.out), ended.err

    def test_an_export_and_its_run_stand_in_one_table(self, places: Path, forks: Forks) -> None:
        targets = [places / name for name in ("adaptive", "plain", "deploy")]
        found, told = self.rows(forks, *targets, "--runtime", "torch", "onnx", "--batch", "1", "16", "--images", "48")
        assert told == ""
        for batch in (1, 16):
            rows = [row for row in found["rows"] if row["batch"] == batch]
            names = [(Path(row["target"]).name, row["runtime"], row["part"]) for row in rows]
            assert names == [
                ("adaptive", "torch", "policy"),
                ("adaptive", "torch", "full"),
                ("adaptive", "onnx", "policy"),
                ("adaptive", "onnx", "full"),
                ("plain", "torch", "full"),
                ("plain", "onnx", "full"),
                ("deploy", "onnx", "policy"),
                ("deploy", "onnx", "full"),
            ]
            assert {row["images"] for row in rows} == {48}
            by_policy = [row for row in rows if row["part"] == "policy"]
            assert len({(row["top1"], tuple(row["shares"])) for row in by_policy}) == 1, "the same answers"
            assert len([share for share in by_policy[0]["shares"] if share]) > 1
            assert [row["shares"] for row in rows if row["part"] == "full"][:3] == [[0, 0, 1], [0, 0, 1], [1]]
            assert all(row["p50"] > 0 and row["of_first"]["median"] > 0 for row in rows)
        assert (found["threads"], found["rounds"], found["device"]) == (1, 2, "cpu")

    def test_the_table_shows_them(self, places: Path, forks: Forks) -> None:
        words = ["bench", "inference", str(places / "adaptive"), str(places / "deploy"), "--batch", "4", *QUICK]
        ended = forks.run([*words, "--images", "8"])
        assert (ended.code, ended.err) == (0, "")
        assert "batch 4: 8 images of test, 2 rounds on " in ended.out
        for text in ("torch, policy", "torch, full", "onnx, policy", "onnx, full", "images/s", "p99", "top-1 %"):
            assert text in ended.out

    def test_a_run_without_a_policy_has_its_full_row_and_advice_that_works(self, places: Path, forks: Forks) -> None:
        found, told = self.rows(forks, places / "without", "--batch", "2", "--images", "4")
        assert [row["part"] for row in found["rows"]] == ["full"]
        assert "has no policy.json, so only its full network is measured; make one with: adaptive calibrate" in told

    def test_an_export_alone_needs_data(self, places: Path, digits: Path, forks: Forks, tmp_path: Path) -> None:
        deploy = str(places / "deploy")
        line = forks.run(["bench", "inference", deploy, *QUICK]).error_line("bench")
        assert f"{deploy} is an export, which names no dataset: give --data FOLDER with its 10 classes" in line
        found, _ = self.rows(forks, deploy, "--data", digits, "--batch", "8", "--images", "40")
        beside, _ = self.rows(forks, places / "adaptive", deploy, "--batch", "8", "--images", "40")
        answers = [[(r["top1"], r["shares"]) for r in one["rows"] if r["runtime"] == "onnx"] for one in (found, beside)]
        assert answers[0] == answers[1], "the same images, in the same preprocessing"

    def test_other_classes_are_refused(self, places: Path, forks: Forks, tmp_path: Path) -> None:
        others = self.other_classes(tmp_path)
        run = str(places / "adaptive")
        line = forks.run(["bench", "inference", run, "--data", str(others), *QUICK]).error_line("bench")
        assert f"{others} has other classes than {run} (2 and 10); give --data a dataset with the same ones" in line

    def test_too_few_images_are_said(self, places: Path, forks: Forks) -> None:
        words = [places / "plain", "--batch", "2", "--images", "100000", "--split", "val"]
        found, _ = self.rows(forks, *words)
        [row] = found["rows"]
        assert row["images"] < 1000
        assert any("of 100,000 asked for" in notice for notice in found["notices"])

    def test_blocks_are_of_many_images_at_batch_1(self, places: Path, forks: Forks) -> None:
        words = ["bench", "inference", str(places / "adaptive"), "--blocks", "--batch", "1", "--images", "40", *QUICK]
        [profile] = json.loads(forks.run([*words, "--json"]).out)["profiles"]
        assert profile["images"] == 40
        assert 0 < profile["still_in"][1] < 1, "one image would be in or not"

    @staticmethod
    def other_classes(folder: Path) -> Path:
        for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
            (folder / "images" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "images" / split / name / f"{split}{name}.png")
        pack(str(folder / "images"), folder / "packed", workers=1, progress=False)
        return folder / "packed"
