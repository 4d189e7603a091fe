"""`adaptive plan`: what it shows, and what it refuses before anything is built."""

import json
from pathlib import Path

import pytest

from tests.helpers.commands import Forks, start_command

GIB = 2**30

# Words after the configuration, and what the one line has to say.
WRONG = {
    "no_nodes": (["--nodes", "0"], ["--nodes 0", "1 or more"]),
    "no_gpus": (["--gpus-per-node", "0"], ["--gpus-per-node 0", "1 or more"]),
    "no_speed": (["--images-per-second", "0"], ["--images-per-second 0", "above 0"]),
    "no_memory": (["--gpu-memory", "-1"], ["--gpu-memory -1", "above 0"]),
    "endless_memory": (["--gpu-memory", "inf"], ["--gpu-memory inf", "above 0"]),
    "ranks_without_simulation": (["--ranks", "1,2"], ["--ranks", "--simulate"]),
    "rate_without_simulation": (["--inter-bandwidth", "3"], ["--inter-bandwidth", "--simulate"]),
    "figure_without_simulation": (["--figure", "x.png"], ["--figure", "--simulate"]),
    "simulation_without_speed": (["--simulate"], ["--images-per-second", "--measure"]),
    "simulation_with_memory": (
        ["--simulate", "--images-per-second", "9", "--gpu-memory", "80"],
        ["--gpu-memory 80", "leave it out"],
    ),
    "ranks_are_words": (
        ["--simulate", "--images-per-second", "9", "--ranks", "1,many"],
        ["--ranks '1,many'", "1,8,64"],
    ),
    "shards_of_nothing": (
        ["--simulate", "--images-per-second", "9", "--shards", "4"],
        ["--shards", "--dataset-images"],
    ),
    "too_many_shards": (
        ["--simulate", "--images-per-second", "9", "--dataset-images", "4", "--shards", "5"],
        ["--shards 5", "--dataset-images 4"],
    ),
    "batch_does_not_divide": (
        ["--nodes", "3", "train.micro_batch=48"],
        ["train.global_batch = 64", "3 ranks", "use 2 ranks", "train.global_batch=63"],
    ),
    "an_image_for_each_rank": (["--nodes", "64"], ["train.global_batch = 64 on 64 rank(s)", "BatchNorm", "32 ranks"]),
    "more_ranks_than_images_in_a_step": (
        ["--nodes", "128"],
        ["train.global_batch = 64", "128 ranks", "use 32 ranks", "train.global_batch=256"],
    ),
    "too_few_shards": (
        ["--gpus-per-node", "32", "--strict", "train.global_batch=1024"],
        ["training shards for 32 ranks", "32 are needed", "--shard-bytes"],
    ),
    "no_dataset": (["data.path=/nowhere"], ["data.path = '/nowhere'", "adaptive pack"]),
    "batch_beyond_the_dataset": (["train.global_batch=4096"], ["train.global_batch = 4096", "lower it"]),
    "unknown_key": (["train.epoch=3"], ["train.epoch", "did you mean epochs"]),
    "unknown_backbone": (["model.backbone=resnet81"], ["model.backbone", "resnet81"]),
    "zero_and_optimizer": (["train.zero_stage=2", "optimizer.name=lamb"], ["optimizer.name = 'lamb'", "zero_stage"]),
    "zero_setting": (
        ["deepspeed.zero_optimization.reduce_bucket_size=-5"],
        ["deepspeed.zero_optimization.reduce_bucket_size = -5"],
    ),
    "odd_micro_batch_with_mixup": (
        ["--nodes", "64", "data.mixup=0.2"],
        ["train.global_batch = 64", "64 ranks", "data.mixup", "even", "use 32 ranks"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line(name: str, forks: Forks, config_file: Path) -> None:
    words, said = WRONG[name]
    line = forks.run(["plan", str(config_file), *words]).error_line("plan")
    for text in said:
        assert text in line, line


def test_missing_configuration(forks: Forks) -> None:
    line = forks.run(["plan", "nowhere.yaml"]).error_line("plan")
    assert "nowhere.yaml does not exist" in line


@pytest.mark.parametrize("words", [["--measure", "--images-per-second", "4"], ["--colour"], ["--nodes", "two"]])
def test_words_that_make_no_command_line(words: list[str], forks: Forks, config_file: Path) -> None:
    ended = forks.run(["plan", str(config_file), "--nodes", "1", *words])
    assert ended.code == 2, ended
    assert len(ended.err.splitlines()) == 1


@pytest.mark.end_to_end
def test_help_is_quick_and_needs_no_torch() -> None:
    ended = start_command(["plan", "--help"], PYTHONPROFILEIMPORTTIME="1")
    assert ended.code == 0
    assert "--gpus-per-node" in ended.out
    assert "--simulate" in ended.out
    assert not [line for line in ended.err.splitlines() if line.endswith((" torch", " numpy", " deepspeed"))]


def test_everything_in_json(forks: Forks, config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["--nodes", "2", "--gpus-per-node", "2", "--images-per-second", "16", "--json"]
    ended = forks.run(["plan", str(config_file), *words, "train.micro_batch=12", f"train.run_folder={folder}"])
    assert ended.code == 0, ended
    plan = json.loads(ended.out)
    assert (plan["ranks"], plan["micro_batch"], plan["accumulation"], plan["global_batch"]) == (4, 8, 2, 64)
    assert plan["micro_batch_limit"] == 12
    assert plan["steps_per_epoch"] == plan["data"]["steps"] == 1297 // 64
    assert plan["steps"] == 1  # train.max_steps
    # 16 images per rank and step, at 16 images/s.
    assert plan["time"]["step_seconds"] == 1.0
    assert plan["time"]["epoch_seconds"] == plan["steps_per_epoch"]
    assert plan["device"] == "cpu"
    moments = plan["memory"]["moments"]
    assert plan["memory"]["peak_bytes"] == max(moment["total"] for moment in moments.values())
    for moment in moments.values():
        assert moment["total"] == sum(size for kind, size in moment.items() if kind != "total")
    assert plan["memory"]["by_zero_stage"]["0"] == plan["memory"]["needed_bytes"]
    (reduced,) = plan["traffic"]["collectives"]
    assert plan["traffic"]["bytes_sent_per_rank_and_step"] == 2 * 3 / 4 * reduced["bytes"]
    assert not folder.exists(), "planning writes nothing"


def test_a_derived_micro_batch_is_told_and_a_bad_one_is_warned_of(forks: Forks, config_file: Path) -> None:
    told = forks.run(["plan", str(config_file), "train.global_batch=62", "train.micro_batch=30"]).out.splitlines()
    assert told[0] == "batch: 1 rank(s) x 2 images x 31 accumulated = 62 per step"
    assert told[1].startswith("train.micro_batch = 30: the 62 images of a rank divide into 2 per forward pass at most")
    [warning] = [line for line in told if line.startswith("warning: train.micro_batch = 30")]
    assert "train.micro_batch=31" in warning


def test_a_simulation_refuses_what_the_plan_refuses(forks: Forks, config_file: Path) -> None:
    assumed = ["--simulate", "--images-per-second", "9", "--dataset-images", "4096", "--gpus-per-node", "64"]
    line = forks.run(["plan", str(config_file), *assumed]).error_line("plan")
    assert "BatchNorm" in line
    assert "32 ranks" in line


def test_tables_and_warnings(forks: Forks, config_file: Path) -> None:
    words = ["--gpus-per-node", "32", "train.global_batch=1024", "train.zero_stage=1"]
    ended = forks.run(["plan", str(config_file), *words])
    assert ended.code == 0, ended
    for text in (
        "batch: 32 rank(s) x 32 images x 1 accumulated = 1024 per step", "steps: 1 per epoch", "optimizer step",
        "master weights", "all-gather of weights", "time: unknown; give --images-per-second",
    ):  # fmt: skip
        assert text in ended.out, ended.out
    warnings = [line for line in ended.out.splitlines() if line.startswith("warning: ")]
    assert any("32 are needed" in line for line in warnings), warnings
    assert any("linear scaling rule would say 1.6" in line for line in warnings), warnings
    assert any("273 of 1297 training images" in line for line in warnings), warnings


def test_memory_for_decoded_images_is_shown(forks: Forks, config_file: Path) -> None:
    words = ["plan", str(config_file), "data.in_memory=true"]
    told = forks.run(words).out
    images = 1297 + 200
    needed = images * (32 * 32 * 3 + 16)
    assert f"data.in_memory: {needed / 2**20:,.0f} MiB of every node's memory for decoded images" in told
    assert "read once by every node; a rank takes 1,280 images per epoch from memory" in told
    assert json.loads(forks.run([*words, "--json"]).out)["data"]["decoded_bytes_per_node"] == needed


def test_what_does_not_fit_is_refused_with_what_would(forks: Forks, config_file: Path) -> None:
    fits = forks.run(["plan", str(config_file), "--gpu-memory", "1"])
    assert fits.code == 0, fits
    assert "fits into 1.00 GiB; largest micro batch: 64" in fits.out
    ended = forks.run(["plan", str(config_file), "--gpu-memory", "0.005"])
    assert "DOES NOT FIT into" in ended.out
    line = ended.error_line("plan")
    assert "do not fit into 0.01 GiB" in line or "do not fit into 0.00 GiB" in line
    assert "train.checkpointing=true" in line


@pytest.mark.full  # a benchmark of its own
def test_measuring_takes_steps_here(forks: Forks, config_file: Path) -> None:
    ended = forks.run(["plan", str(config_file), "--measure", "--json", "train.global_batch=8"])
    assert ended.code == 0, ended
    time = json.loads(ended.out.splitlines()[-1])["time"]
    assert time["images_per_second_per_rank"] > 0
    assert time["source"].startswith("measured")


def test_a_run_that_cannot_be_continued_is_told(forks: Forks, config_file: Path, existing_run: Path) -> None:
    words = [f"train.run_folder={existing_run}", "optimizer.lr=0.5"]
    line = forks.run(["plan", str(config_file), *words]).error_line("plan")
    assert "optimizer.lr" in line


def test_simulation(forks: Forks, config_file: Path, tmp_path: Path) -> None:
    figure = tmp_path / "deep" / "scaling.png"
    words = ["--simulate", "--images-per-second", "500", "--dataset-images", "4096", "--shards", "32"]
    words += ["--ranks", "1,4,32,64,128", "--gpus-per-node", "4", "--figure", str(figure), "data.path=/nowhere"]
    words += ["train.micro_batch=24"]
    ended = forks.run(["plan", str(config_file), *words, "--json"])
    assert ended.code == 0, ended
    found = json.loads(ended.out)
    rows = found["rows"]
    assert [row["world"] for row in rows] == [1, 4, 32, 64, 128]
    assert [row["nodes"] for row in rows] == [1, 1, 8, 16, 32]
    assert [(row["micro_batch"], row["accumulation"]) for row in rows] == [(16, 4), (16, 1), (2, 1), (16, 1), (16, 1)]
    assert rows[0]["fixed"] == rows[0]["growing"] == 1.0
    assert rows[0]["sent"] == {"0": 0, "1": 0, "2": 0, "3": 0}
    # As without --simulate: the global batch does not divide by 128, and BatchNorm cannot take an image for each of 64.
    assert [row["fixed"] is None for row in rows] == [False, False, False, True, True]
    assert all(0 < row["fixed"] <= 1 for row in rows[:3])
    assert [row["fixed_bound"] for row in rows[3:]] == ["batch", "batch"]
    assert found["assumptions"]["micro_batch"] == 24
    stops = {(stop["batch"], stop["below"]): stop for stop in found["stops"]}
    assert stops["fixed", 0.5]["world"] is not None
    assert stops["fixed", 0.5]["remedy"]
    assert figure.read_bytes().startswith(b"\x89PNG")
    told = forks.run(["plan", str(config_file), *words])
    assert "efficiency" in told.out
    assert "* train.global_batch = 64 is not for so many ranks" in told.out
    assert "up to 24 images per pass" in told.out
    assert "going on from the middle of an epoch" in told.out
