"""The ablation in miniature: fairness between variants, what it writes, and the gradient record against plain sums."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
import torch
import torch.nn.functional as F

from adaptive import create_model, runs
from adaptive.config.loading import load_config
from adaptive.data.reading.stream import TrainStream
from adaptive.data.shards.index import load_index
from adaptive.errors import ConfigError
from adaptive.networks.from_config import build_network
from benchmarks import ablation
from benchmarks.ablation import main
from benchmarks.ablation_study import report
from benchmarks.ablation_study.page import single, spread
from benchmarks.ablation_study.run import answers, digest, percent, stream
from benchmarks.ablation_study.settings import Experiment, parts_of, tree
from benchmarks.shared.gradient_conflict import conflict
from tests.helpers.ranks import fork_context

VARIANTS = ["sum", "ge+isc+ofa"]
SEEDS = 2


@pytest.fixture(scope="module")
def miniature(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ablation; its folder holds runs/ and results/."""
    folder = tmp_path_factory.mktemp("ablation")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ablation, "subprocess", SimpleNamespace(run=run_in_a_fork, STDOUT=subprocess.STDOUT))
        assert main(words(digits, folder)) == 0
    return folder


def run_in_a_fork(words: list[str], stdout: IO[str], stderr: int, env: dict[str, str]) -> SimpleNamespace:
    """What stands in for a new interpreter, which would import the libraries anew for each of the runs."""
    process = fork_context().Process(target=_script, args=(words[1:], stdout.name, env))
    process.start()
    process.join()
    return SimpleNamespace(returncode=process.exitcode)


def _script(words: list[str], log: str, environment: dict[str, str]) -> None:
    with Path(log).open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def words(digits: Path, folder: Path) -> list[str]:
    places = ["--packed", str(digits), "--work", str(folder / "runs"), "--output", str(folder / "results")]
    return [*places, "--variants", *VARIANTS, "--seeds", str(SEEDS), "--epochs", "2", "--steps", "12", "--jobs", "2"]


@pytest.mark.end_to_end
@pytest.mark.full
def test_the_command_writes_json_page_and_figures(miniature: Path) -> None:
    result = json.loads((miniature / "results" / "ablation_small.json").read_text())
    page = (miniature / "results" / "ablation_small.md").read_text()
    assert list(result["variants"]) == VARIANTS
    assert result["settings"]["steps"] == 12
    assert str(miniature) not in page + json.dumps(result)
    assert "--variants sum ge+isc+ofa" in result["command"]
    for name in ("ablation_small.png", "ablation_small_gradients.png"):
        assert (miniature / "results" / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in page
    plain, full = (result["variants"][name]["macs"] for name in VARIANTS)
    # Only links, and only from the second exit on, tell the costs apart.
    assert plain[0] == full[0]
    assert all(a < b for a, b in zip(plain[1:], full[1:], strict=True))


@pytest.mark.end_to_end
@pytest.mark.full
def test_variants_of_a_seed_start_alike_and_see_the_same_images(miniature: Path, digits: Path) -> None:
    for seed in range(SEEDS):
        found = [json.loads((miniature / "runs" / f"{v}_seed{seed}" / "ablation.json").read_text()) for v in VARIANTS]
        index, weights, orders = load_index(digits), [], []
        for variant in VARIANTS:
            config = load_config(miniature / "runs" / f"{variant}_seed{seed}.yaml")
            weights.append(build_network(config, len(index.classes)).state_dict())
            stream = TrainStream(index, config.data, "train", seed=seed, global_batch=64, micro_batch=64)
            batches = stream.batches(0, 12)
            orders.append(list(batches))
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert {entry["initial_weights"] for entry in found} == {digest(weights[0])}
        for one, other in zip(*orders, strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.images, other.images)
        assert found[0]["image_order"] == found[1]["image_order"]
    other = json.loads((miniature / "runs" / "sum_seed0" / "ablation.json").read_text())
    assert other["initial_weights"] != found[0]["initial_weights"]
    assert other["image_order"] != found[0]["image_order"]


@pytest.mark.end_to_end
@pytest.mark.full
def test_numbers_in_the_table_are_those_of_the_run_folders(miniature: Path) -> None:
    page = (miniature / "results" / "ablation_small.md").read_text()
    for variant in VARIANTS:
        top1 = []
        for seed in range(SEEDS):
            trained = runs.load(miniature / "runs" / f"{variant}_seed{seed}", "last")
            assert trained.checkpoint.step == 12
            # Other batches than the benchmark's: an image's answer does not depend on them.
            found = answers(trained.network, stream(trained.config, "test", 97), torch.device("cpu"))
            top1.append(percent(found))
        mean, deviation = torch.tensor(top1).double().mean(0), torch.tensor(top1).double().std(0)
        cells = [f"{m:.2f} ± {s:.2f}" for m, s in zip(mean.tolist(), deviation.tolist(), strict=True)]
        assert f"| {variant} | {' | '.join(cells)} |" in page


@pytest.mark.end_to_end
@pytest.mark.full
def test_finished_runs_stay_and_the_reading_is_taken_in(
    miniature: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = sorted((miniature / "runs").glob("*/ablation.json"))
    before = [path.stat().st_mtime_ns for path in records]
    (miniature / "results" / "ablation_small_reading.md").write_text("What a person saw.\n")
    assert main(words(digits, miniature)) == 0
    assert [path.stat().st_mtime_ns for path in records] == before
    assert "## Reading\n\nWhat a person saw.\n" in (miniature / "results" / "ablation_small.md").read_text()
    assert main([*words(digits, miniature), "--set", "optimizer.lr=0.2"]) == 1
    assert "optimizer.lr = 0.1, now 0.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--variants", "sum", "gee"], "did you mean ge"),
        (["--variants", "sum+ge"], "leave out sum or ge"),
        (["--variants", "ofa+next"], "ofa and next exclude each other"),
        (["--variants", "ge+teacher"], "needs --teacher"),
        (["--seeds", "0"], "--seeds 0"),
        (["--source", "nowhere"], "--source nowhere"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--work", str(tmp_path)] + ([] if "--source" in options else ["--packed", str(tmp_path)])
    assert main([*places, *options]) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_every_part_is_a_configuration() -> None:
    from adaptive.config.loading import parse_config

    experiment = Experiment("gpu", "cifar10", 60, teacher={"teacher_model": "resnet18"})
    changed = {}
    for part in ("sum", "ge", "isc", "ofa", "next", "teacher", "linear_up", "last_only", "exit_drop", "pcgrad"):
        config = parse_config(tree(experiment, part, 1, Path("data"), Path("run")))
        changed[part] = config.model_dump(exclude={"data"})
    assert all(changed[part] != changed["sum"] for part in changed if part != "sum")
    assert changed["last_only"]["train"]["last_only_epochs"] == 12
    with pytest.raises(ConfigError, match="did you mean pcgrad"):
        parts_of("sum+pcgrd")


def test_paired_differences_and_budgets() -> None:
    ours = [{"test_top1": [50.0, 61.0]}, {"test_top1": [52.0, 60.0]}]
    theirs = [{"test_top1": [49.0, 60.0]}, {"test_top1": [49.0, 61.0]}]
    found = report._difference(ours, theirs)
    assert found["mean"] == pytest.approx([2.0, 0.0, 1.0])
    assert found["se"] == pytest.approx([1.0, 1.0, 0.0])
    assert report.statistics([[3.0]]) == {"mean": [3.0], "sd": None}
    curve = [{"val_macs": m, "val_top1": a} for m, a in ((1.0, 50.0), (2.0, 60.0), (2.5, 59.0), (4.0, 70.0))]
    assert report.choose(curve, 3.0)["val_macs"] == 2.0
    assert report.choose(curve, 0.5)["val_macs"] == 1.0
    assert spread([1.0], None) == ["1.00"]


@pytest.mark.parametrize(("deviation", "cell"), [(None, "22.33"), (0.0, "22.33 ± 0.00"), (1.25, "22.33 ± 1.25")])
def test_seeds_may_agree_and_there_may_be_one(deviation: float | None, cell: str) -> None:
    assert single({"mean": 22.333, "sd": deviation}) == cell


def test_gradients_of_a_tiny_network_against_plain_autograd() -> None:
    torch.manual_seed(0)
    network = create_model(
        "msdnet", num_classes=3, exits=3, input_size=16, collaboration=False, base=1, step=1, channels=4, growth=4,
        growth_factors=(1, 2), bottleneck=False, head_channels=8,
    ).double()  # fmt: skip
    images, labels = torch.randn(8, 3, 16, 16).double(), torch.arange(8) % 3
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = conflict(network, images, labels)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())

    network.equilibrium = False
    flat: list[list[torch.Tensor]] = []
    for i in range(3):
        network.zero_grad()
        F.cross_entropy(network(images)[i], labels).backward()
        flat.append(
            [
                torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in block])
                for block in (list(network.block_parameters(j)) for j in range(3))
            ]
        )
    for i in range(3):
        for j in range(3):
            assert found.norms[i][j] == pytest.approx(float(flat[i][j].norm()), rel=1e-6)
            assert (found.norms[i][j] > 0) == (j <= i)
    for j in range(3):
        summed = sum(flat[i][j] for i in range(j, 3))
        assert found.sum_norms[j] == pytest.approx(float(summed.norm()), rel=1e-6)
        # Equalised: the mean over the exits at or behind the block.
        assert found.equalised_norms[j] == pytest.approx(float(summed.norm()) / (3 - j), rel=1e-6)
        for i in range(3):
            for m in range(3):
                value = found.cosines[j][i][m]
                if min(i, m) < j:
                    assert value is None
                else:
                    a, b = flat[i][j], flat[m][j]
                    assert value == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
        weights = [p.detach().flatten() for p in network.block_parameters(j) if p.ndim == 4]
        assert found.weight_norms[j] == pytest.approx(float(torch.cat(weights).norm()), rel=1e-6)
    own = torch.cat(flat[2])
    total = torch.cat([sum(flat[i][j] for i in range(j, 3)) for j in range(3)])
    mean = torch.cat([sum(flat[i][j] for i in range(j, 3)) / (3 - j) for j in range(3)])
    assert found.with_sum[2] == pytest.approx(float(F.cosine_similarity(own, total, dim=0)), abs=1e-6)
    assert found.with_equalised[2] == pytest.approx(float(F.cosine_similarity(own, mean, dim=0)), abs=1e-6)
    assert found.with_sum[0] == pytest.approx(found.with_equalised[0], abs=1e-6)  # in block 1 they are parallel
