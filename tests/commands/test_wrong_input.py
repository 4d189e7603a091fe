"""Every mistake of a user ends the command at once: one line on stderr with key, value and remedy, and exit code 1."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from adaptive.data.packing.pack import pack
from adaptive.doctor.checks.network import free_port
from tests.helpers.commands import Forks, start_command
from tests.helpers.disks import small_disk
from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here a GPU is no wrong input")


# Overrides, and what the line must say: key, value, remedy.
CONFIGURATION = {
    "unknown_key": (["train.epoch=3"], ["train.epoch", "did you mean epochs"]),
    "key_of_another_section": (["train.lr=3"], ["train.lr", "did you mean optimizer.lr"]),
    "misspelt_section": (["optimzer.lr=0.1"], ["unknown key optimzer", "did you mean optimizer"]),
    "unknown_key_of_a_phase": (["phases=[{epochs: 1, lern: all}]"], ["phases.0.lern", "did you mean learn"]),
    "wrong_type": (["train.epochs=many"], ["train.epochs = 'many'", "valid integer"]),
    "wrong_type_of_two_allowed": (["model.exits=few"], ["model.exits = 'few'", "valid integer, or", "valid list"]),
    "not_one_of_the_choices": (["train.precision=fp8"], ["train.precision = 'fp8'", "'fp32', 'bf16' or 'fp16'"]),
    "negative_lr": (["optimizer.lr=-0.1"], ["optimizer.lr = -0.1", "greater than 0"]),
    "negative_decay": (["optimizer.weight_decay=-1"], ["optimizer.weight_decay = -1", "greater than or equal to 0"]),
    "negative_seed": (["train.seed=-1"], ["train.seed = -1", "greater than or equal to 0"]),
    "negative_workers": (["data.workers=-1"], ["data.workers = -1", "greater than or equal to 0"]),
    "negative_mixup": (["data.mixup=-0.2"], ["data.mixup = -0.2", "greater than or equal to 0"]),
    "no_exits": (["model.exits=0"], ["model.exits = 0", "greater than or equal to 1"]),
    "empty_data_path": (["data.path="], ["data.path = ''", "at least 1 character"]),
    "override_without_equals": (["train.epochs"], ["override 'train.epochs'", "expected section.key=value"]),
    "override_without_key": (["=3"], ["override '=3'", "expected section.key=value"]),
    "override_broken": (["train.epochs=[1"], ["override 'train.epochs=[1'", "not valid YAML in line 1"]),
    "override_below_a_value": (["model.backbone.x=1"], ["model.backbone.x", "'test_resnet'", "not a section"]),
    "weights_of_wrong_length": (
        ["train.exit_weights=[1, 2]"],
        ["train.exit_weights = [1.0, 2.0]", "for 3 exits", "one per exit"],
    ),
    "no_micro_batch": (["train.micro_batch=0"], ["train.micro_batch = 0", "greater than or equal to 1"]),
    "deepspeed_setting_owned_elsewhere": (
        ["deepspeed.train_batch_size=3"],
        ["deepspeed.train_batch_size", "train.global_batch", "remove it"],
    ),
}
MACHINE_DATA_AND_MODEL = {
    "misspelt_backbone": (["model.backbone=test_resnett"], ["backbone = 'test_resnett'", "did you mean test_resnet"]),
    "more_exits_than_branch_points": (["model.exits=99"], ["exits = 99", "6 branch points", "at most 7"]),
    "unknown_module": (["model.exits=[layer9]"], ["exits", "'layer9'", "did you mean layer4"]),
    "module_named_twice": (["model.exits=[layer2, layer2]"], ["exits", "'layer2'", "name each module once"]),
    "weights_for_named_exits": (
        ["model.exits=[layer1, layer2]", "train.exit_weights=[1, 2]"],
        ["train.exit_weights = [1.0, 2.0]", "for 3 exits", "one per exit"],
    ),
    "unknown_model_option": (["model.options={bogus: 1}"], ["test_resnet", "'bogus': 1", "unexpected keyword"]),
    "model_option_of_a_key": (
        ["model.options={num_classes: 3}"],
        ["model.options.num_classes = 3", "set by model.num_classes", "remove it"],
    ),
    "batch_of_one": (["train.micro_batch=1"], ["train.micro_batch = 1", "BatchNorm", "2 images or more"]),
    "offloading_without_zero": (
        ["deepspeed.zero_optimization.offload_optimizer={device: cpu}"],
        ["offload_optimizer = {'device': 'cpu'}", "train.zero_stage=1"],
    ),
    "weights_file_missing": (["model.weights=nowhere.pth"], ["weights = 'nowhere.pth'", "no such file"]),
    "dataset_missing": (["data.path=nowhere"], ["data.path = 'nowhere'", "adaptive pack SOURCE nowhere"]),
    "unknown_split": (["data.train_split=trian"], ["data.train_split = 'trian'", "did you mean train", "test, train"]),
    "class_count": (["model.num_classes=7"], ["model.num_classes = 7", "10 classes", "remove model.num_classes"]),
    "batch_above_dataset": (["train.global_batch=5000"], ["train.global_batch = 5000", "1297 images", "1297 or less"]),
    "unknown_optimizer": (["optimizer.name=adamww"], ["optimizer.name = 'adamww'", "did you mean adamw"]),
    "optimizer_unfit_for_zero": (
        ["optimizer.name=lamb", "train.zero_stage=1"],
        ["optimizer.name = 'lamb'", "train.zero_stage = 1", "use train.zero_stage=0"],
    ),
    "unknown_optimizer_option": (["optimizer.options={bogus: 1}"], ["optimizer.options", "'bogus': 1", "sgd"]),
    "warmup_longer_than_run": (["schedule.warmup_epochs=3"], ["schedule.warmup_epochs = 3", "below", "2 epochs"]),
    "odd_micro_batch_with_mixup": (
        ["data.mixup=0.2", "train.global_batch=63"],
        ["train.global_batch = 63", "data.mixup", "even", "train.global_batch=62"],
    ),
    "unknown_augmentation": (
        ["data.auto_augment=nonsense"],
        ["data.auto_augment = 'nonsense'", "for example rand-m9-mstd0.5-inc1"],
    ),
    "links_that_the_model_lacks": (
        ["model.collaboration=false", "phases=[{epochs: 1, collaboration: true}]"],
        ["'train'", "collaboration", "model.collaboration"],
    ),
    "gpu_where_there_is_none": (["train.device=cuda"], ["train.device = 'cuda'", "no usable GPU", "train.device=cpu"]),
    "nothing_to_continue": (
        ["train.resume=must"],
        ["train.resume = 'must'", "none was ever written", "train.resume=auto"],
    ),
}
EVERYTHING = CONFIGURATION | MACHINE_DATA_AND_MODEL


def expect(line: str, parts: list[str]) -> None:
    for part in parts:
        assert part in line


@pytest.mark.parametrize("case", EVERYTHING)
def test_wrong_configuration(case: str, config_file: Path, tmp_path: Path, forks: Forks) -> None:
    if case == "gpu_where_there_is_none" and torch.cuda.is_available():
        pytest.skip("here a GPU is no wrong input")
    overrides, parts = EVERYTHING[case]
    ended = forks.run(["train", str(config_file), f"train.run_folder={tmp_path / 'run'}", *overrides])
    expect(ended.error_line(), parts)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    "case",
    [
        "unknown_key",
        pytest.param("misspelt_backbone", marks=pytest.mark.full),
        pytest.param("nothing_to_continue", marks=pytest.mark.full),
    ],
)
def test_the_command_itself_says_one_line(case: str, config_file: Path, tmp_path: Path) -> None:
    """In a fresh process, what libraries print as they are imported would show; the last case imports them all."""
    overrides, parts = EVERYTHING[case]
    ended = start_command(["train", str(config_file), f"train.run_folder={tmp_path / 'run'}", *overrides])
    expect(ended.error_line(), parts)


def test_settings_without_use_are_told(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    words = ["train", str(config_file), f"train.run_folder={tmp_path / 'run'}", "data.crop_padding=2"]
    ended = forks.run(words)
    assert ended.code == 0, ended
    assert "note: data.crop_padding = 2 does nothing with data.crop = 'none'" in ended.out.splitlines()
    planned = forks.run(["plan", str(config_file), "data.crop_padding=2"])
    assert "data.crop_padding = 2 does nothing" in planned.out


def test_correct_configuration_is_quiet(existing_run: Path) -> None:
    """The other half of every test here: without the mistake the same command trains."""
    assert (existing_run / "checkpoints" / "step-00000001" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: {backbone: test_resnet\n", ["not valid YAML in line 2, column 1", "expected ',' or '}'"]),
        (
            "model: {backbone: a}\nmodel: {backbone: b}\n",
            ["not valid YAML in line 2, column 1", 'duplicate key "model"'],
        ),
        ("- model\n- data\n", ["expected sections", "list"]),
        ("", ["expected sections", "NoneType"]),
        ("model: {backbone: test_resnet}\ndata: {image_size: 32}\n", ["data.path is missing", "data.path=..."]),
        ("model: {backbone: test_resnet}\n", ["data is missing"]),
        ("data: {path: somewhere}\nmodel: {}\n", ["model.backbone is missing", "model.backbone=..."]),
        ("model: \xff\n", ["cannot be read", "UTF-8"]),
    ],
)
def test_wrong_file(text: str, parts: list[str], tmp_path: Path, forks: Forks) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    expect(forks.run(["train", str(file)]).error_line(), [str(file), *parts])


def test_missing_file(config_file: Path, forks: Forks) -> None:
    line = forks.run(["train", str(config_file.with_name("smal.yml"))]).error_line()
    expect(line, ["smal.yml does not exist", f"did you mean {config_file}"])
    expect(forks.run(["train"]).error_line(), ["no configuration given", "adaptive train configs/quickstart.yaml"])


def test_missing_shards(config_file: Path, other_digits: Path, tmp_path: Path, forks: Forks) -> None:
    (other_digits / "train-00001.tar").unlink()
    words = ["train", str(config_file), f"data.path={other_digits}", f"train.run_folder={tmp_path / 'run'}"]
    parts = [f"data.path = '{other_digits}'", "lacks 1 of 10 train shards: train-00001.tar", "copy them or pack again"]
    expect(forks.run(words).error_line(), parts)


def test_shard_of_another_size(config_file: Path, other_digits: Path, tmp_path: Path, forks: Forks) -> None:
    shard = other_digits / "train-00001.tar"
    content = shard.read_bytes()
    shard.unlink()  # it is a link to the fixture's
    shard.write_bytes(content[:-10240])
    words = ["train", str(config_file), f"data.path={other_digits}", f"train.run_folder={tmp_path / 'run'}"]
    expect(forks.run(words).error_line(), ["data.path", str(shard), f"{len(content) - 10240} bytes", "copy it again"])


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('"count": ', '"count": 1', ["is not the sum", "pack the dataset again"]),
        ('"version": 1', '"version": 7', ["version 7", "reads 1", "pack the dataset again"]),
        ('"sha256": "', '"sha256": "../', ["sha256", "pack the dataset again"]),
        ("{", "", ["not valid JSON", "pack the dataset again"]),
    ],
)
def test_index_that_does_not_match(
    old: str, new: str, parts: list[str], config_file: Path, other_digits: Path, tmp_path: Path, forks: Forks
) -> None:
    index = other_digits / "index.json"
    text = index.read_text()
    assert old in text
    index.unlink()
    index.write_text(text.replace(old, new, 1))
    words = ["train", str(config_file), f"data.path={other_digits}", f"train.run_folder={tmp_path / 'run'}"]
    expect(forks.run(words).error_line(), ["data.path", str(index), *parts])


def test_index_of_other_content(config_file: Path, other_digits: Path, tmp_path: Path, forks: Forks) -> None:
    index = other_digits / "index.json"
    tree = json.loads(index.read_text())
    tree["classes"][0] = "nought"
    index.unlink()
    index.write_text(json.dumps(tree))
    words = ["train", str(config_file), f"data.path={other_digits}", f"train.run_folder={tmp_path / 'run'}"]
    expect(forks.run(words).error_line(), ["data.path", "changed after packing", "fingerprint", "pack again"])


def test_weights_of_another_model(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    file = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=10).state_dict() | {"conv1.0.weight": torch.zeros(3)}, file)
    words = ["train", str(config_file), f"model.weights={file}", f"train.run_folder={tmp_path / 'run'}"]
    expect(
        forks.run(words).error_line(),
        [f"weights = '{file}'", "does not fit the backbone", "size mismatch for conv1.0.weight"],
    )


def test_pickled_weights_are_not_executed(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    file = tmp_path / "evil.pth"
    torch.save({"conv1.weight": _Evil(tmp_path / "owned")}, file)
    words = ["train", str(config_file), f"model.weights={file}", f"train.run_folder={tmp_path / 'run'}"]
    expect(forks.run(words).error_line(), [f"weights = '{file}'", "tensors only"])
    assert not (tmp_path / "owned").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_run_folder_below_a_file(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "run"
    ended = forks.run(["train", str(config_file), f"train.run_folder={folder}"])
    expect(ended.error_line(), [f"train.run_folder = '{folder}'", "Not a directory", "choose another folder"])


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with small_disk(tmp_path / "disk", 1) as folder:
        yield folder


def test_no_space_for_the_run(config_file: Path, disk: Path, forks: Forks) -> None:
    folder = disk / "run"
    ended = forks.run(["train", str(config_file), f"train.run_folder={folder}"])
    expect(ended.error_line(), [f"train.run_folder = '{folder}'", "1 MiB free", "MiB; free space, choose another"])


def test_no_right_to_write_the_run(config_file: Path, disk: Path, forks: Forks) -> None:
    """Root may write anywhere but on a read-only file system."""
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    folder = disk / "run"
    ended = forks.run(["train", str(config_file), f"train.run_folder={folder}"])
    expect(ended.error_line(), [f"train.run_folder = '{folder}'", "Read-only file system", "choose another folder"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_right_to_write_the_folder(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    folder = tmp_path / "closed" / "run"
    ended = forks.run(["train", str(config_file), f"train.run_folder={folder}"])
    expect(ended.error_line(), [f"train.run_folder = '{folder}'", "Permission denied", "choose another folder"])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.resume=never", ["already holds a run", "choose another folder", "train.resume=auto"]),
        ("model.exits=2", ["model.exits = 3, now it is 2", "keep the value", "another train.run_folder"]),
        ("model.backbone=test_resnet.r160_in1k", ["model.backbone = 'test_resnet'", "now it is", "keep the value"]),
        ("optimizer.lr=0.3", ["optimizer.lr = 0.1, now it is 0.3", "keep the value"]),
        ("train.global_batch=128", ["train.global_batch = 64, now it is 128", "keep the value"]),
    ],
)
def test_existing_run(override: str, parts: list[str], config_file: Path, existing_run: Path, forks: Forks) -> None:
    before = snapshot(existing_run)
    ended = forks.run(["train", str(config_file), f"train.run_folder={existing_run}", override])
    expect(ended.error_line(), [str(existing_run), *parts])
    assert snapshot(existing_run) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the one that says who was here last."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".owner"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_existing_run_of_another_dataset(config_file: Path, existing_run: Path, tmp_path: Path, forks: Forks) -> None:
    other = tmp_path / "other"
    pack("builtin:digits", other, seed=1, workers=1, progress=False)
    words = ["train", str(config_file), f"train.run_folder={existing_run}", f"data.path={other}"]
    line = forks.run(words).error_line()
    expect(line, [f"data.path = '{other}'", "fingerprint", "use that dataset, another", "train.accept_new_data=true"])


def test_existing_run_without_a_valid_checkpoint(
    config_file: Path, existing_run: Path, tmp_path: Path, forks: Forks
) -> None:
    folder = damaged_copy(existing_run, tmp_path)
    for resume in ("auto", "must"):
        ended = forks.run(["train", str(config_file), f"train.run_folder={folder}", f"train.resume={resume}"])
        expect(ended.error_line(), [str(folder), "weights.safetensors has 5 bytes", "another train.run_folder"])


def damaged_copy(run: Path, folder: Path) -> Path:
    copied = folder / "damaged"
    shutil.copytree(run, copied)
    (copied / "checkpoints" / "step-00000001" / "weights.safetensors").write_bytes(b"short")
    return copied


@pytest.mark.full  # one rank says the same
@pytest.mark.ranks
@pytest.mark.end_to_end
def test_two_ranks_say_it_once(config_file: Path, tmp_path: Path) -> None:
    """A batch that two ranks cannot share is the same mistake on both; it is told once, and nobody waits."""
    ended = subprocess.run(
        [
            *[str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port())],
            *[str(REPOSITORY / "launcher" / "train.py"), str(config_file), "train.global_batch=65"],
            f"train.run_folder={tmp_path / 'run'}",
        ],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    lines = [line for line in (ended.stdout + ended.stderr).splitlines() if "adaptive train: error" in line]
    assert 1 <= len(lines) <= 2, ended  # the second rank speaks where the launcher takes seconds to end it
    for line in lines:
        expect(line, ["train.global_batch = 65", "2 ranks", "train.global_batch=64"])
    assert ended.returncode != 0
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{run}", "--batch", "0"], ["--batch 0", "1 or more"]),
        (["{run}", "--workers", "-1"], ["--workers -1", "0 or more"]),
        (["{run}", "--split", "tset"], ["--split = 'tset'", "did you mean test", "test, train, val"]),
        (["{run}", "--data", "nowhere"], ["nowhere does not exist", "adaptive pack SOURCE nowhere"]),
        (["{run}", "--checkpoint", "77"], ["no checkpoint '77'", "best, last, or one of the steps 1"]),
        (["{run}", "--checkpoint", "bset"], ["no checkpoint 'bset'", "best, last, or one of the steps 1"]),
        (["{run}", "--weights", "ema"], ["no moving average", "train.ema_decay"]),
        pytest.param(["{run}", "--device", "cuda"], ["--device cuda", "use cpu or auto"], marks=without_gpu),
        (["nowhere"], ["nowhere is no run folder", "config.yaml", "give the folder"]),
    ],
)
def test_wrong_evaluation(words: list[str], parts: list[str], existing_run: Path, forks: Forks) -> None:
    before = snapshot(existing_run)
    line = forks.run(["evaluate", *(word.format(run=existing_run) for word in words)]).error_line("evaluate")
    expect(line, parts)
    assert snapshot(existing_run) == before


def test_evaluation_of_damaged_checkpoints(existing_run: Path, tmp_path: Path, forks: Forks) -> None:
    folder = damaged_copy(existing_run, tmp_path)
    for which in ("best", "last", "1"):
        line = forks.run(["evaluate", str(folder), "--checkpoint", which]).error_line("evaluate")
        expect(line, [str(folder), "step-00000001", "weights.safetensors has 5 bytes"])


def test_evaluation_with_other_classes(existing_run: Path, tmp_path: Path, forks: Forks) -> None:
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "0.png")
    packed = tmp_path / "packed"
    pack(tmp_path / "images", packed, workers=1, progress=False)
    words = ["evaluate", str(existing_run), "--data", str(packed), "--split", "train"]
    expect(forks.run(words).error_line("evaluate"), [str(packed), "other classes", "give --data its dataset"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere", "{new}"], ["source nowhere", "does not exist", "builtin:digits"]),
        (["builtin:letters", "{new}"], ["builtin:letters", "builtin:digits"]),
        (["builtin:digits", "{new}", "--shard-count", "0"], ["--shard-count 0", "1 or more"]),
        (["builtin:digits", "{new}", "--workers", "0"], ["--workers 0", "1 or more"]),
        (["builtin:digits", "{new}", "--hold-out", "-1"], ["--hold-out -1", "0 or more"]),
        (["builtin:digits", "{digits}"], ["{digits}", "--overwrite"]),
        (["builtin:digits", "{full}"], ["{full}", "not empty", "give another folder"]),
        (["{new}", "{new}"], ["{new}", "lies inside the source", "give another folder"]),
    ],
)
def test_wrong_packing(words: list[str], parts: list[str], digits: Path, tmp_path: Path, forks: Forks) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").touch()
    places = {"new": tmp_path / "new", "full": tmp_path / "full", "digits": digits}
    line = forks.run(["pack", *(word.format(**places) for word in words)]).error_line("pack")
    expect(line, [part.format(**places) for part in parts])
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "letter.txt").exists()
