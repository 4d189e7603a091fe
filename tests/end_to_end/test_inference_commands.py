"""From a trained run to a policy to answers, by the commands, against loops of the tests' own over single images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaptive.inference.calibration.calibrate import curve
from adaptive.inference.measuring.time_model import TimeModel
from adaptive.inference.outputs import Outputs
from adaptive.inference.policy import Policy
from adaptive.inference.runner import DynamicClassifier
from adaptive.runs import TrainedRun, collect_outputs, load
from tests.end_to_end.test_evaluate import read_test_images
from tests.helpers.commands import Forks, start_command

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedRun:
    return load(run)


@pytest.fixture(scope="module")
def held_out(trained: TrainedRun) -> Outputs:
    return collect_outputs(trained, "val")


@pytest.fixture(scope="module")
def calibrated(run: Path, commands: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run with a policy at half the full cost."""
    copy = tmp_path_factory.mktemp("calibrated") / "digits"
    shutil.copytree(run, copy)
    ended = commands.run(["calibrate", str(copy), "--budget", "0.5"])
    assert (ended.code, ended.err) == (0, "")
    return copy


@pytest.fixture(scope="module")
def image_folder(digits: Path, trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images as files: the first of the test split."""
    import tarfile

    folder = tmp_path_factory.mktemp("images")
    with tarfile.open(sorted(digits.glob("test-*.tar"))[0]) as tar:
        for member in [m for m in tar.getmembers() if m.name.endswith(".png")][:30]:
            (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    return folder


def walk(policy: Policy, probabilities: list[Tensor]) -> tuple[int, float, int]:
    """Label, confidence and exit of one image, from the probabilities (C,) of its exits; confidence policies."""
    for i, chances in enumerate(probabilities):
        if i == len(probabilities) - 1 or float(chances.max()) >= policy.thresholds[i]:
            return int(chances.argmax()), float(chances.max()), i + 1
    raise AssertionError


def test_budgeted_curve_is_that_of_a_walk_over_single_images(
    run: Path, trained: TrainedRun, held_out: Outputs, digits: Path, commands: Forks
) -> None:
    ended = commands.run(["evaluate", str(run), "--json"])
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(ended.out)
    macs = [entry["macs"] for entry in result["exits"]]
    budgeted = result["budgeted"]
    points = budgeted["points"]
    assert (budgeted["kind"], budgeted["method"], budgeted["split"], len(points)) == ("confidence", "search", "val", 40)
    assert points[0]["budget"] == macs[0]
    assert points[-1]["budget"] == pytest.approx(macs[-1])
    assert points[0]["shares"] == [1.0, 0.0, 0.0]
    policies = curve(held_out.logits, held_out.labels, macs, [point["budget"] for point in points])
    images, labels = read_test_images(digits, trained)
    with torch.no_grad():
        probabilities = [z.softmax(1) for z in trained.network(images)]
    for point, policy in list(zip(points, policies, strict=True))[::6]:
        found = [walk(policy, [p[n] for p in probabilities]) for n in range(len(labels))]
        right = sum(label == int(truth) for (label, _, _), truth in zip(found, labels, strict=True))
        # The command runs other batches: rounding may bring one image across a threshold.
        assert point["top1"] == pytest.approx(100 * right / len(labels), abs=100.1 / len(labels))
        cost = sum(macs[exit_ - 1] for _, _, exit_ in found) / len(labels)
        assert point["cost"] == pytest.approx(cost, abs=1.001 * (macs[-1] - macs[0]) / len(labels))
        low, high = point["top1_interval"]
        assert low <= point["top1"] <= high
        assert point["top1_loss"] == pytest.approx(result["exits"][-1]["top1"] - point["top1"], abs=1e-4)
        assert point["cost_interval"][0] <= point["cost"] <= point["cost_interval"][1]
    assert result["level"] == 0.95
    assert result["exits"][-1]["top1_loss_interval"][0] < 0 < result["exits"][-1]["top1_loss_interval"][1]
    times = result["milliseconds"]["exits"]
    assert 0 < times[0] < times[1] < times[2]
    model = TimeModel.model_validate(result["milliseconds"]["model"])
    assert model.exits == pytest.approx(times)
    assert model.conditions.batch == result["milliseconds"]["batch"]
    assert {"threads", "precision", "runtime", "repeats"} < set(result["milliseconds"])


def test_evaluate_leaves_out_what_it_is_told_to(run: Path, commands: Forks) -> None:
    ended = commands.run(["evaluate", str(run), "--split", "val", "--no-timing", "--json"])
    result = json.loads(ended.out)
    assert result["budgeted"] is None  # policies are never measured on the images that they were chosen on
    assert "milliseconds" not in result
    ended = commands.run(["evaluate", str(run), "--policy-split", "nowhere"])
    assert "--policy-split = 'nowhere' is no split" in ended.error_line("evaluate")
    ended = commands.run(["evaluate", str(run), "--kind", "patience", "--method", "geometric"])
    assert ended.code == 0
    chosen = "patience policies, thresholds by geometric, chosen on other images than measured: on 200 images of val"
    assert f"{chosen}, and measured on test" in " ".join(ended.out.split())


def test_calibrate_keeps_its_budget_and_says_what_it_brings(
    calibrated: Path, trained: TrainedRun, held_out: Outputs
) -> None:
    policy = Policy.load(calibrated / "policy.json")
    macs = [cost.macs for cost in trained.network.costs()]
    assert policy.calibration is not None
    assert policy.network is not None
    assert policy.network.backbone == "test_resnet"
    assert policy.expected_cost <= 0.5 * macs[-1]
    probabilities = [policy.probabilities(i, z) for i, z in enumerate(held_out.logits)]
    found = [walk(policy, [p[n] for p in probabilities]) for n in range(len(held_out.labels))]
    right = sum(label == int(truth) for (label, _, _), truth in zip(found, held_out.labels, strict=True))
    assert policy.expected_accuracy == pytest.approx(100 * right / len(found))
    assert policy.expected_cost == pytest.approx(sum(macs[exit_ - 1] for _, _, exit_ in found) / len(found))
    assert policy.calibration.counts == [sum(exit_ == i + 1 for _, _, exit_ in found) for i in range(3)]


@pytest.mark.parametrize(
    "words",
    [
        ["--budget", "0.7", "--method", "geometric", "--no-temperature"],
        ["--budget", "60%"],
        pytest.param(["--budget", "50%", "--confidence", "0.9"], marks=pytest.mark.full),
        ["--budget", "0.8", "--kind", "patience"],
        ["--budget", "0.8", "--kind", "gate"],
        ["--max-loss", "5", "--delta", "0.2"],
    ],
    ids=" ".join,
)
def test_every_way_to_calibrate(words: list[str], run: Path, commands: Forks, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "policy.json"
    ended = commands.run(["calibrate", str(run), "--json", "--out", str(out), *words])
    assert (ended.code, ended.err) == (0, "")
    result, policy = json.loads(ended.out), Policy.load(out)
    assert result["thresholds"] == policy.thresholds
    assert sum(result["shares"]) == pytest.approx(1)
    low, high = result["top1_interval"]
    assert low <= result["top1"] <= high
    assert result["top1_loss"] == pytest.approx(result["top1_full"] - result["top1"])
    assert result["top1_loss_interval"][0] <= result["top1_loss"] <= result["top1_loss_interval"][1]
    assert result["macs_interval"][0] <= result["macs"] <= result["macs_interval"][1]
    assert result["level"] == 0.95
    if words[0] == "--budget" and "%" not in words[1] and "gate" not in words:
        assert result["macs"] <= float(words[1]) * result["macs_full"] * (1 + 1e-9)
        assert (result["tested"], result["promise"], result["no_promise"]) == (None, None, None)
    else:
        assert result["tested"] in (None, result["images"] // 2)
    if "%" in words[1]:
        record = result["calibration"]
        assert record["images"] == result["tested"] == 100
        assert record["top1"] == pytest.approx(result["top1"])
        assert record["confidence"] == (0.9 if "--confidence" in words else 0.95)
        assert (result["promise"] is not None) == (record["bound"] >= float(words[1].removesuffix("%")))
    if words[0] == "--max-loss":
        assert result["calibration"]["target"] == {"epsilon": 0.05, "delta": 0.2}
    assert not (run / "policy.json").exists()


@pytest.mark.full
def test_what_cannot_be_promised_is_said(run: Path, commands: Forks, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "policy.json")]
    ended = commands.run(["calibrate", str(run), "--max-loss", "0.1", *out])
    text = " ".join(ended.out.split())
    assert "nothing is promised: at most 0.1 points below the full network with probability 0.9 takes at least" in text
    assert "4,603 held-out images, even with no loss at all" in text
    assert "Nobody leaves early" in text
    result = json.loads(commands.run(["calibrate", str(run), "--max-loss", "0.1", "--json", *out]).out)
    assert (result["promise"], result["images_needed"], result["shares"]) == (None, 4603, [0, 0, 1])
    assert "4,603" in result["no_promise"]
    for words, message in (
        (["--max-loss", "1", "--confidence", "0.9"], "--confidence 0.9 belongs to --budget 95%; with --max-loss give"),
        (["--budget", "0.5", "--confidence", "0.9"], "--confidence 0.9 belongs to an accuracy, as --budget 95%"),
        (
            ["--budget", "95%", "--confidence", "95"],
            "--confidence 95: give a probability between 0 and 1, such as 0.95",
        ),
    ):
        assert message in commands.run(["calibrate", str(run), *words, *out]).error_line("calibrate")


@pytest.mark.full
def test_a_folder_with_a_dollar_is_evaluated_and_drawn(run: Path, commands: Forks, tmp_path: Path) -> None:
    odd = tmp_path / "a $x^ {run} $y_"
    shutil.copytree(run, odd)
    ended = commands.run(["evaluate", str(odd), "--no-timing"])
    assert (ended.code, ended.err) == (0, "")
    assert (odd / "evaluation_test.png").is_file()
    ended = commands.run(["report", str(odd), "--wall", "0"])
    assert (ended.code, ended.err) == (0, "")


def test_a_budget_in_milliseconds_is_measured_here(run: Path, commands: Forks, tmp_path: Path) -> None:
    out = tmp_path / "policy.json"
    options = ["--timing-batch", "8", "--rounds", "4", "--threads", "1", "--json", "--out", str(out)]
    middle = "1000000ms"
    for attempt in range(6):
        ended = commands.run(["calibrate", str(run), "--budget", middle, *options])
        if attempt and ended.code == 0:
            break
        line = ended.error_line("calibrate")
        assert "(torch, fp32, cpu, batch 8, 1 thread); give a budget in this range" in line
        lowest = float(line.split("an image takes from ")[1].split(" ms")[0])
        highest = float(line.split(" exit 1) to ")[1].split(" ms")[0])
        # Halfway up of what was just measured; times differ from run to run, on a busy machine by more than that.
        middle = f"{(lowest + highest) / 2}ms"
    assert ended.code == 0, ended
    policy = Policy.load(out)
    calibration = policy.calibration
    assert calibration is not None
    assert calibration.unit == "ms"
    assert calibration.timing is not None
    assert (calibration.timing.batch, calibration.timing.threads, calibration.timing.runtime) == (8, 1, "torch")
    assert policy.expected_cost <= float(middle.removesuffix("ms")) * (1 + 1e-9)
    timing = json.loads(ended.out)["timing"]
    assert timing["ratio"] == pytest.approx(timing["measured"] / timing["promised"])
    assert timing["conditions"] == calibration.timing.model_dump()
    assert {"repeats", "full", "again", "images", "shares", "words"} < set(timing)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--threads", "0"], "--threads 0 is too small; give 1 or more"),
        (["--rounds", "3"], "--rounds 3 is too small; give 4 or more"),
        (["--timing-batch", "0"], "--timing-batch 0 is too small; give 1 or more"),
        (["--runtime", "onnx", "--precision", "bf16"], "--runtime onnx computes in fp32"),
        (["--runtime", "onnx", "--device", "cuda"], "--runtime onnx is timed on the processor"),
        (["--runtime", "tensorrt"], "invalid choice: 'tensorrt'"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_options_of_milliseconds_are_checked_first(words: list[str], said: str, commands: Forks) -> None:
    ended = commands.run(["calibrate", "no-such-run", "--budget", "3ms", *words])
    assert ended.code == 2 if "tensorrt" in words else ended.code != 0
    assert said in ended.err


def test_options_of_milliseconds_are_refused_where_nothing_is_timed(commands: Forks) -> None:
    ended = commands.run(["calibrate", "no-such-run", "--budget", "0.5", "--runtime", "onnx"])
    line = ended.error_line("calibrate")
    assert "--runtime onnx goes with a budget in milliseconds (--budget 3.5ms); leave it out" in line


def test_predict_gives_what_the_python_way_gives(
    calibrated: Path, trained: TrainedRun, image_folder: Path, commands: Forks, tmp_path: Path
) -> None:
    from PIL import Image

    files = sorted(image_folder.iterdir())
    images = torch.stack([trained.transform(Image.open(file).convert("RGB")) for file in files])
    policy = Policy.load(calibrated / "policy.json")
    with torch.no_grad():
        sure = policy.probabilities(0, trained.network(images)[0]).amax(1).sort().values
    half = float(sure[len(files) // 2 - 1 : len(files) // 2 + 1].mean())  # half of them leave at the first exit
    policy = policy.with_thresholds([half, *policy.thresholds[1:]], policy.calibration)
    policy.save(tmp_path / "policy.json")
    words = ["predict", str(calibrated), str(image_folder), "--policy", str(tmp_path / "policy.json")]
    ended = commands.run([*words, "--json", "--top", "3", "--batch", "7"])
    assert (ended.code, ended.err) == (0, "")
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["image"] for row in rows] == [str(file) for file in files]
    found = DynamicClassifier(trained, policy).predict(images)
    for row, label, confidence, exit_ in zip(rows, *(part.tolist() for part in found), strict=True):
        assert (row["label"], row["exit"]) == (trained.classes[label], exit_)
        assert row["confidence"] == pytest.approx(confidence, abs=1e-5)
        assert row["ms"] > 0
        assert row["top"][0]["label"] == row["label"]
        assert [top["confidence"] for top in row["top"]] == sorted((t["confidence"] for t in row["top"]), reverse=True)
        assert len(row["top"]) == 3
    assert len(set(found.exits.tolist())) > 1, "the images have to part"


def test_predict_reads_files_patterns_and_pipes(calibrated: Path, image_folder: Path, commands: Forks) -> None:
    files = sorted(image_folder.iterdir())

    def labels(words: list[str]) -> list[str]:
        ended = commands.run(["predict", str(calibrated), *words, "--json"])
        assert (ended.code, ended.err) == (0, "")
        return [json.loads(line)["label"] for line in ended.out.splitlines()]

    everything = labels([str(image_folder)])
    assert labels([str(image_folder / "*.png")]) == everything
    assert labels([str(files[3]), str(files[1])]) == [everything[3], everything[1]]
    names = "\n".join(str(file) for file in files).encode()
    piped = start_command(["predict", str(calibrated), "-", "--json"], stdin=names)
    assert [json.loads(line)["label"] for line in piped.out.splitlines()] == everything
    piped = start_command(["predict", str(calibrated), "-"], stdin=files[2].read_bytes())
    assert (piped.code, piped.err) == (0, "")
    assert "stdin" in piped.out
    assert "of 3" in piped.out


def test_an_unreadable_image_is_named_and_the_others_are_answered(
    calibrated: Path, image_folder: Path, commands: Forks, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_text("no image")
    good = str(sorted(image_folder.iterdir())[0])
    ended = commands.run(["predict", str(calibrated), str(tmp_path / "bad.png"), good, "--json"])
    assert str(tmp_path / "bad.png") in ended.error_line("predict")
    assert [json.loads(line)["image"] for line in ended.out.splitlines()] == [good]


def test_what_a_folder_holds_besides_images_is_told(
    calibrated: Path, image_folder: Path, commands: Forks, tmp_path: Path
) -> None:
    image = sorted(image_folder.iterdir())[0].read_bytes()
    for name in ("plain", "b.jfif", ".hidden.png"):
        (tmp_path / name).write_bytes(image)
    (tmp_path / "notes.txt").write_text("no image")
    ended = commands.run(["predict", str(calibrated), str(tmp_path), "--json"])
    assert ended.code == 0
    assert [json.loads(line)["image"] for line in ended.out.splitlines()] == [
        str(tmp_path / "b.jfif"),
        str(tmp_path / "plain"),
    ]
    told = [
        f"1 .png: hidden, for example {tmp_path}/.hidden.png",
        f"1 .txt: not an image, for example {tmp_path}/notes.txt",
    ]
    assert ended.err.splitlines() == [f"adaptive predict: skipped {line}" for line in told]


def test_without_a_policy_everybody_goes_to_the_end(run: Path, image_folder: Path, commands: Forks) -> None:
    ended = commands.run(["predict", str(run), str(image_folder), "--json"])
    assert ended.code == 0
    assert ended.err.count("\n") == 1
    assert "no policy.json" in ended.err
    assert {json.loads(line)["exit"] for line in ended.out.splitlines()} == {3}


def test_bench_inference_tells_where_the_time_goes(calibrated: Path, run: Path, commands: Forks) -> None:
    words = ["bench", "inference", str(calibrated), "--blocks", "--batch", "1", "16", "--rounds", "2"]
    ended = commands.run([*words, "--json"])
    assert (ended.code, ended.err) == (0, "")
    profiles = json.loads(ended.out)["profiles"]
    assert [measured["batch"] for measured in profiles] == [1, 16]
    for measured in profiles:
        assert measured["still_in"][0] == 1
        assert measured["still_in"] == sorted(measured["still_in"], reverse=True)
        assert all(part["block"] > 0 and part["exit"] > 0 for part in measured["blocks"])
        assert measured["overhead"]["median"] > 0
    ended = commands.run(words)
    assert "ideal" in ended.out
    line = commands.run(["bench", "inference", str(run), "--blocks"]).error_line("bench")
    assert "has no policy.json" in line


@pytest.fixture(scope="module")
def other_run(run: Path, digits: Path, commands: Forks) -> Path:
    """A run of another network, of one step."""
    folder = run.with_name("other")
    config = run.with_name("digits.yaml")
    words = ["train", str(config), f"train.run_folder={folder}", "model.exits=2", "train.max_steps=1", "train.epochs=1"]
    ended = commands.run(words)
    assert ended.code == 0, ended
    return folder


def test_wrong_input_is_one_line_each(
    calibrated: Path, run: Path, other_run: Path, image_folder: Path, commands: Forks, tmp_path: Path
) -> None:
    image = str(sorted(image_folder.iterdir())[0])
    (tmp_path / "empty").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    policy = str(calibrated / "policy.json")
    cases = [
        (["predict", str(calibrated), str(tmp_path / "empty")], "holds no images"),
        (["predict", str(calibrated), str(tmp_path / "none.png")], "does not exist"),
        (["predict", str(calibrated), str(tmp_path / "*.png")], "matches no image"),
        (["predict", str(calibrated), image, "--top", "0"], "--top 0"),
        (["predict", str(other_run), image, "--policy", policy], "for 3 exits"),
        (["predict", str(calibrated), image, "--weights", "plain"], "calibrated for other weights"),
        (["predict", str(bare), image], "no valid checkpoint"),
        (["predict", str(tmp_path), image], "no run folder"),
        (["predict", str(calibrated), image, "--policy", str(tmp_path / "p.json")], "cannot be read"),
        (["calibrate", str(run), "--budget", "0.01"], "below the first exit's cost"),
        (["calibrate", str(run), "--budget", "1T"], "above the last exit's"),
        (["calibrate", str(run), "--budget", "much"], "--budget much is not understood"),
        (["calibrate", str(run), "--budget", "120%"], "more than every image right"),
        (["calibrate", str(run), "--budget", "99.99%"], "ask for at most that"),
        (["calibrate", str(run), "--max-loss", "0"], "--max-loss 0"),
        (["calibrate", str(run), "--max-loss", "1", "--delta", "2"], "--delta 2"),
        (["calibrate", str(run), "--budget", "0.5", "--delta", "0.2"], "belongs to --max-loss"),
        (["calibrate", str(run), "--budget", "0.5", "--split", "tset"], "did you mean test"),
        (["calibrate", str(run), "--budget", "0.5", "--out", "/proc/nowhere/p.json"], "--out /proc/nowhere/p.json"),
        (["calibrate", str(bare), "--budget", "0.5"], "no valid checkpoint"),
        (["bench", "inference", str(calibrated), "--batch", "0"], "--batch 0"),
        (
            ["bench", "inference", str(calibrated), "--blocks", "--device", "cpu", "--accelerate", "cuda_graphs"],
            "need a CUDA device",
        ),
    ]
    for words, message in cases:
        line = commands.run(words).error_line(words[0])
        assert message in line, (words, line)
