"""`adaptive evaluate` against a computation of the test's own: every test image once, through plain PyTorch."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from adaptive.runs import TrainedRun, load
from tests.helpers.commands import Forks

pytestmark = pytest.mark.end_to_end

TEST_IMAGES = 300


def read_test_images(digits: Path, run: TrainedRun) -> tuple[Tensor, Tensor]:
    """Every test image and its label, straight from the tar files."""
    images, labels = [], []
    for shard in sorted(digits.glob("test-*.tar")):
        with tarfile.open(shard) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}  # type: ignore[union-attr]
        for name in content:
            if name.endswith(".cls"):
                labels.append(int(content[name]))
                image = Image.open(io.BytesIO(content[name.removesuffix("cls") + "png"])).convert("RGB")
                images.append(run.transform(image))
    return torch.stack(images), torch.tensor(labels)


def figures(run: TrainedRun, images: Tensor, labels: Tensor) -> list[dict[str, float]]:
    with torch.no_grad():
        outputs = [torch.cat(z) for z in zip(*(run.network(part) for part in images.split(7)), strict=True)]
    last = outputs[-1].argmax(1)
    results = []
    for logits in outputs:
        ranked = logits.argsort(dim=1, descending=True)
        chance = logits.double().softmax(1)[torch.arange(len(labels)), labels]
        results.append(
            {
                "top1": 100 * sum(int(r[0] == y) for r, y in zip(ranked, labels, strict=True)) / len(labels),
                "top5": 100 * sum(int(y in r[:5]) for r, y in zip(ranked, labels, strict=True)) / len(labels),
                "agreement": 100 * sum(int(r[0] == z) for r, z in zip(ranked, last, strict=True)) / len(labels),
                "loss": float(-chance.log().mean()),
            }
        )
    return results


@pytest.mark.parametrize("weights", ["auto", "plain"])
def test_figures_are_those_of_an_independent_computation(
    weights: str, run: Path, digits: Path, commands: Forks
) -> None:
    ended = commands.run(["evaluate", str(run), "--json", "--batch", "64", "--weights", weights])
    assert (ended.code, ended.err) == (0, "")
    result = json.loads(ended.out)
    assert json.loads((run / "evaluation_test.json").read_text()) == result
    trained = load(run, averaged=weights == "auto")
    images, labels = read_test_images(digits, trained)
    assert result["images"] == len(labels) == TEST_IMAGES
    assert result["weights"] == ("ema" if weights == "auto" else "plain")
    expected = figures(trained, images, labels)
    assert max(e["top1"] for e in expected) > 50, "it has learned nothing that could be compared"
    for entry, own, cost in zip(result["exits"], expected, trained.network.costs(), strict=True):
        for name, value in own.items():
            assert entry[name] == pytest.approx(value, abs=1e-4), name
        assert (entry["macs"], entry["parameters"]) == (cost.macs, cost.parameters)


@pytest.mark.full  # figures of both are compared above
def test_plain_and_averaged_weights_differ(run: Path, commands: Forks) -> None:
    losses = []
    for weights in ("plain", "ema"):
        ended = commands.run(["evaluate", str(run), "--json", "--weights", weights])
        losses.append([entry["loss"] for entry in json.loads(ended.out)["exits"]])
    assert losses[0] != losses[1]


def test_command_writes_json_and_figure_and_prints_a_table(run: Path, commands: Forks) -> None:
    (run / "evaluation_val.json").unlink(missing_ok=True)
    ended = commands.start(["evaluate", str(run), "--split", "val", "--checkpoint", "last"], COLUMNS="160").wait()
    assert (ended.code, ended.err) == (0, "")
    header = next(line for line in ended.out.splitlines() if "top-1" in line)
    for column in ("exit", "after", "MACs", "share", "parameters", "top-1 %", "top-5 %", "loss"):
        assert column in header
    assert "200 images of val" in ended.out
    assert "100.0 %" in ended.out
    result = json.loads((run / "evaluation_val.json").read_text())
    assert result["split"] == "val"
    assert [entry["exit"] for entry in result["exits"]] == [1, 2, 3]
    for entry in result["exits"]:
        assert f"{entry['top1']:.2f}" in ended.out
        assert entry["after"] in ended.out
    with Image.open(run / "evaluation_val.png") as figure:
        assert figure.format == "PNG"
        assert min(figure.size) > 300
        assert len(set(figure.convert("L").getdata())) > 10, "an empty picture"
