"""The smaller benchmarks on tiny networks and data: what they write, not how fast anything is."""

from __future__ import annotations

import importlib
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.data.packing.pack import pack
from benchmarks import (
    calibration_size,
    data,
    data_in_memory,
    equilibrium,
    full_run,
    inference_batches,
    modes,
    ranks,
    startup,
    suite,
)
from benchmarks.shared import data_loaders
from benchmarks.shared.exposed import exposed_share
from tests.helpers.ranks import run_ranks

TINY = ["--backbone", "test_resnet", "--image-size", "32", "--batch", "2", "--classes", "10"]


def written(folder: Path, stem: str) -> dict[str, Any]:
    assert (folder / f"{stem}.md").read_text(encoding="utf-8").startswith("# ")
    return dict(json.loads((folder / f"{stem}.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_part_of_the_suite_is_a_command_line_that_its_benchmark_takes(device: str) -> None:
    for lines in suite.PARTS.values():
        for line in lines[device]:
            name, *words = shlex.split(line)
            module = importlib.import_module(f"benchmarks.{name}")
            (module.parser().parse_args if hasattr(module, "parser") else module.parse)(words)


def test_the_suite_lists_runs_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--only", "data", "startup", "--device", "cpu", "--list"]) == 0
    scripts = [f"python benchmarks/{name}.py" for name in ("data", "data_in_memory", "startup", "build")]
    assert capsys.readouterr().out.splitlines() == scripts
    for words, named in ((["--only", "speed"], "--only speed"), (["--source", str(tmp_path / "none")], "none")):
        assert suite.main(words) == 1
        assert named in capsys.readouterr().err


@pytest.mark.full
def test_the_loaders_make_batches_of_the_same_photos(tmp_path: Path) -> None:
    words = ["--images", "24", "--batch", "4", "--rounds", "2", "--starts", "0", "--output", str(tmp_path)]
    assert data.main(words) in (0, 1)  # the limits are for quiet machines and many photos
    result = written(tmp_path, "data_bicubic")
    assert list(result["images_per_second"]) == list(data_loaders.LOADERS)
    assert {limit["over"] for limit in result["limits"]} == {"torchvision", "timm", "bare"}
    data_loaders.prepare(None, tmp_path / "photos", 12, 64)
    job = data_loaders.Job(str(tmp_path / "photos"), "bilinear", 4)
    for name in data_loaders.LOADERS:
        found = data_loaders.alone(name, job, 2)
        assert found["images_per_second"] > 0
        assert found["first_batch_s"] > 0


def test_photos_are_read_from_a_folder_or_their_lack_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data.main(["--source", str(tmp_path), "--images", "200"]) == 1
    assert "holds no file named .jpg" in capsys.readouterr().err
    (tmp_path / "one.JPEG").write_bytes(data_loaders._drawn(1)[0])
    assert len(data_loaders.prepare(tmp_path, tmp_path / "photos", 12, 64)) == 12


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_small_images_from_shards_and_from_memory(tmp_path: Path) -> None:
    words = ["--images", "100", "--batch", "8", "--rounds", "2", "--seconds", "0.01", "--workers", "1"]
    assert data_in_memory.main([*words, "--device", "cpu", "--output", str(tmp_path)]) in (0, 1)
    result = written(tmp_path, "data_in_memory_cpu")
    assert list(result["ways"]) == ["no worker", "1 worker", "1 worker, bytes for an accelerator"]
    for way in result["ways"].values():
        assert all(rate["median"] > 0 for rate in way["images_per_second"].values())
        assert way["memory_over_shards"]["median"] > 0
    assert result["images"] == 90


@pytest.mark.full
def test_modes(tmp_path: Path) -> None:
    words = [*TINY, "--rounds", "2", "--no-compile", "--device", "cpu", "--output", str(tmp_path)]
    assert modes.main(words) in (0, 1)
    result = written(tmp_path, "modes_cpu_test_resnet")
    assert list(result["modes"]) == ["loop", "fp32", "fp32_channels-last", "bf16", "bf16_channels-last"]
    assert result["modes"]["loop"]["rate_over_loop"]["median"] == 1
    assert result["modes"]["loop"]["memory_over_loop"] == 1


@pytest.mark.ranks
@pytest.mark.full
def test_ranks(tmp_path: Path) -> None:
    words = [*TINY, "--rounds", "2", "--worlds", "1", "--device", "cpu", "--output", str(tmp_path)]
    assert ranks.main(words) == 0
    entries = written(tmp_path, "ranks_cpu_test_resnet")["worlds"]["1"]
    assert list(entries) == ["loop", "zero_0", "zero_1", "zero_2", "zero_3"]


@pytest.mark.ranks
@pytest.mark.full
def test_a_full_run_on_noise_and_on_shards(tmp_path: Path) -> None:
    pack("builtin:digits", tmp_path / "digits", workers=1, progress=False)
    words = [*TINY, "--steps", "2", "--device", "cpu", "--output", str(tmp_path)]
    assert run_ranks(full_run.main, 1, words) == [0]
    assert run_ranks(full_run.main, 1, [*words, "--data", str(tmp_path / "digits"), "--workers", "1"]) == [0]
    noise, shards = (written(tmp_path, f"full_run_cpu_test_resnet{end}") for end in ("", "_shards"))
    assert noise["data_wait_share"]["median"] == 0
    assert 0 < shards["data_wait_share"]["median"] < 1
    assert 0 < noise["of_matmul"] < 1
    assert str(tmp_path) not in shards["command"]


def test_calibration_of_many_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--images", "200", "--exits", "3", "--classes", "5", "--budgets", "3", "--method", "search"]
    assert calibration_size.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_gib"] >= found["before_gib"] > 0
    logits, labels = calibration_size.drawn(2000, 3, 5)
    right = [(values.argmax(1) == labels).double().mean() for values in logits]
    assert right[0] < right[1] < right[2]


def test_early_exit_by_batch_size(tmp_path: Path) -> None:
    words = ["--backbone", "test_resnet", "--rounds", "2", "--batches", "1", "3", "--device", "cpu"]
    assert inference_batches.main([*words, "--output", str(tmp_path)]) == 0
    result = written(tmp_path, "inference_batches_cpu_test_resnet")
    assert [entry["batch"] for entry in result["batches"]] == [1, 3]
    assert [entry["accelerated"] for entry in result["batches"]] == [[], []]


@pytest.mark.full  # it compiles
def test_early_exit_compiled_and_equilibrium_compiled(tmp_path: Path) -> None:
    words = ["--backbone", "test_resnet", "--rounds", "2", "--device", "cpu", "--output", str(tmp_path)]
    assert inference_batches.main([*words, "--batches", "2", "--accelerate", "eager", "compile"]) == 0
    [found] = written(tmp_path, "inference_batches_cpu_test_resnet")["batches"][0]["accelerated"]
    assert found["accelerate"] == "compile"
    assert found["dynamic"] > 0
    assert 1 <= found["prepared"] <= 8  # four stages, at one image and at two
    assert "## Accelerated" in (tmp_path / "inference_batches_cpu_test_resnet.md").read_text()
    more = ["--exits", "3", "--image-size", "32", "--batch", "2", "--classes", "10", "--repetitions", "2", "--compile"]
    assert equilibrium.main([*words, *more]) == 0
    result = written(tmp_path, "equilibrium_cpu_test_resnet_compiled")
    assert set(result["step_ms"]) == {"without", "without again", "with"}
    assert result["steps_percent"]["error"] >= 0
    assert result["forks_percent"]["q1"] <= result["forks_percent"]["q3"]


@pytest.mark.full
def test_start_up_ends_its_clock_at_the_first_record(tmp_path: Path) -> None:
    pack("builtin:digits", tmp_path / "digits", workers=1, progress=False)
    training = startup._Training(startup._training_words(tmp_path, "test_resnet"), tmp_path)
    training()
    assert len(training.seconds) == 1
    assert (tmp_path / "run0" / "checkpoints").is_dir(), "the training was not waited for"
    startup.commands(tmp_path)["help"]()
    assert set(startup.commands(tmp_path)) | {"first_step"} == set(startup.TITLES)


@pytest.mark.parametrize(
    ("main", "words", "named"),
    [
        (data.main, ["--rounds", "1"], "--rounds 1"),
        (data.main, ["--images", "20"], "--images 20"),
        (data_in_memory.main, ["--seconds", "0"], "--seconds 0"),
        (data_in_memory.main, ["--images", "100", "--batch", "100"], "--batch 100"),
        (modes.main, ["--batch", "1"], "--batch 1"),
        (ranks.main, ["--worlds", "999"], "--worlds 999"),
        (full_run.main, ["--steps", "1"], "--steps 1"),
        (inference_batches.main, ["--budget", "2"], "--budget 2"),
        (inference_batches.main, ["--backbone", "no_such_model"], "no_such_model"),
        (inference_batches.main, ["--accelerate", "cuda_graphs", "--device", "cpu"], "CUDA graphs need a CUDA device"),
        (equilibrium.main, ["--batch", "1"], "--batch 1"),
    ],
)
def test_mistakes_are_one_line(
    main: Callable[[list[str]], int], words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_communication_is_exposed_where_nothing_else_runs() -> None:
    def event(kind: str, name: str, start: float, length: float) -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length}

    events = [
        event("kernel", "sgemm", 0, 40),
        event("kernel", "conv", 30, 20),
        event("kernel", "ncclDevKernel_AllReduce", 40, 40),  # ten beside the convolution, thirty alone
        event("kernel", "sgd", 90, 10),
        event("cpu_op", "aten::conv2d", 0, 5),
        {"ph": "i", "name": "mark", "ts": 0},
    ]
    assert exposed_share(events, "cuda") == pytest.approx({"collectives": 0.4, "exposed": 0.3})
    assert exposed_share([], "cuda") == {"collectives": 0.0, "exposed": 0.0}


def test_the_plain_loop_learns_what_gradient_equilibrium_says() -> None:
    """Its two rescalings are GE in the scope of the tap: the same gradients as ours, up to the loss's own scale."""
    from adaptive import create_model
    from benchmarks.shared.plain_loop import PlainMultiExit, summed_loss

    torch.manual_seed(0)
    network = create_model("test_resnet", 10, 3, equilibrium="tap", collaboration=False)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    gradients = []
    for forward in (network, PlainMultiExit(network)):
        network.zero_grad()
        summed_loss(forward(images), labels).backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
