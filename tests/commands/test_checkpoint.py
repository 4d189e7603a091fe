"""``adaptive checkpoint``: the list is right about every checkpoint, and timm takes what is exported."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adaptive
from tests.helpers.commands import Ended, Forks
from tests.helpers.ranks import run_ranks
from tests.training.setups import config, train_here


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config_file: Path, forks: Forks) -> Path:
    """Three epochs in two phases, validated, with a moving average; the second epoch's checkpoint is kept for ever."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = ["train.max_steps=null", "train.ema_decay=0.9", "train.global_batch=432", "evaluate.batch=100"]
    words.append("evaluate.every_epochs=2")  # a score in between might be the best
    phases = "phases=[{name: first, epochs: 2}, {name: second, epochs: 2, learn: exits}]"
    words += [phases, "checkpoint.keep=1", "checkpoint.keep_every=2", "optimizer.lr=0.05"]
    ended = forks.run(["train", str(config_file), f"train.run_folder={folder}", *words])
    assert ended.code == 0, ended
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copied"))


def listed(ended: Ended) -> list[dict]:
    assert ended.code == 0, ended
    return json.loads(ended.out)["checkpoints"]


def test_it_lists_every_checkpoint_with_its_marks(run: Path, forks: Forks) -> None:
    entries = listed(forks.run(["checkpoint", str(run), "--json"]))
    assert [(e["step"], e["epoch"], e["phase"], e["lasting"]) for e in entries] == [(6, 2, 0, True), (12, 4, 1, True)]
    assert [e["newest"] for e in entries] == [False, True]
    assert [e["best"] for e in entries] == [False, True]
    assert all(e["valid"] and e["fault"] is None and 0 <= e["score"] <= 100 for e in entries)
    sizes = [sum(f.stat().st_size for f in Path(e["path"]).iterdir()) for e in entries]
    assert [e["bytes"] for e in entries] == sizes
    shown = forks.run(["checkpoint", str(run)])
    assert (shown.code, shown.err) == (0, "")
    rows = [line for line in shown.out.splitlines() if "valid" in line]
    assert re.search(r"6 .* 2 .* first .*for ever .*valid", rows[0])
    assert re.search(r"12 .* 4 .* second .*newest, best, for ever .*valid", rows[1])


def test_damage_is_shown_and_nothing_valid_is_an_error(copied: Path, forks: Forks) -> None:
    damaged = copied / "checkpoints" / "step-00000012" / "weights.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    first, last = listed(forks.run(["checkpoint", str(copied), "--json"]))
    assert (last["valid"], last["newest"], last["best"]) == (False, False, False)
    assert "weights.safetensors does not match its checksum" in last["fault"]
    assert (first["newest"], first["best"]) == (True, True)
    assert all(e["valid"] for e in listed(forks.run(["checkpoint", str(copied), "--json", "--quick"])))
    (copied / "checkpoints" / "step-00000006" / "state.json").unlink()
    ended = forks.run(["checkpoint", str(copied), "--quick"])
    assert ended.code == 0
    assert "state.json is missing" in ended.out
    ended = forks.run(["checkpoint", str(copied)])
    assert "holds no valid checkpoint" in ended.error_line("checkpoint")
    assert "state.json is missing" in ended.out
    shutil.rmtree(copied / "checkpoints")
    assert "holds no checkpoint" in forks.run(["checkpoint", str(copied)]).error_line("checkpoint")


def test_looking_changes_nothing(copied: Path, forks: Forks) -> None:
    leftover = copied / "checkpoints" / ".writing-00000013"
    leftover.mkdir()
    before = sorted((str(p), p.stat().st_mtime_ns) for p in copied.rglob("*"))
    forks.run(["checkpoint", str(copied)])
    assert sorted((str(p), p.stat().st_mtime_ns) for p in copied.rglob("*")) == before


@pytest.mark.parametrize("averaged", [True, False])
def test_timm_loads_the_export_and_gives_what_the_last_exit_gives(
    averaged: bool, run: Path, tmp_path: Path, forks: Forks
) -> None:
    file = tmp_path / "plain.safetensors"
    words = ["--which", "6", "--averaged" if averaged else "--no-averaged"]
    ended = forks.run(["checkpoint", str(run), "--export", str(file), *words])
    assert (ended.code, ended.err) == (0, ""), ended
    assert "Without early exits and ISC links" in ended.out
    plain = timm.create_model("test_resnet", checkpoint_path=str(file), num_classes=10).eval()
    trained = adaptive.load(run, "6", averaged)
    trained.network.collaboration = False
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(plain(images), trained.network(images)[-1], rtol=0, atol=1e-5)
    assert set(load_file(file)) == set(plain.state_dict())
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert (about["backbone"], about["step"], about["averaged"]) == ("test_resnet", "6", json.dumps(averaged))
    assert json.loads(about["classes"]) == trained.classes
    assert json.loads(about["exits"]) == trained.network.exit_names


def test_a_new_run_starts_from_exported_weights(run: Path, config_file: Path, tmp_path: Path, forks: Forks) -> None:
    file = tmp_path / "plain.safetensors"
    assert forks.run(["checkpoint", str(run), "--export", str(file)]).code == 0
    words = ["train", str(config_file), f"train.run_folder={tmp_path / 'new'}", f"model.weights={file}"]
    ended = forks.run([*words, "optimizer.lr=1e-30", "optimizer.weight_decay=0"])
    assert ended.code == 0, ended
    exported, started = load_file(file), adaptive.load(tmp_path / "new").network.backbone_state_dict()
    assert exported.keys() == started.keys()
    changed = [k for k in exported if not torch.equal(exported[k], started[k])]
    assert all(k.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked") for k in changed)


def test_everything_is_exported_too(run: Path, tmp_path: Path, forks: Forks) -> None:
    file = tmp_path / "all.safetensors"
    ended = forks.run(["checkpoint", str(run), "--export-all", str(file), "--which", "last", "--json"])
    assert json.loads(ended.out)["step"] == 12
    trained = adaptive.load(run, "last")
    network = adaptive.create_model("test_resnet", 10, exits=trained.network.exit_names, input_size=32)
    network.load_state_dict(load_file(file))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for one, other in zip(network.eval()(images), trained.network(images), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.ranks
def test_links_that_were_not_trained_yet_are_not_exported(digits: Path, tmp_path: Path, forks: Forks) -> None:
    phases = [{"name": "network", "collaboration": False}, {"name": "exits", "learn": "exits"}]
    small = {"backbone": "msdnet", "exits": 2, "options": {"base": 1, "step": 1, "channels": 4, "growth": 2}}
    tree = config(digits, tmp_path / "run", model=small, phases=phases, train={"max_steps": 3})
    run_ranks(train_here, 1, tree)
    trained = adaptive.load(tmp_path / "run")
    assert not trained.network.collaboration
    file = tmp_path / "all.safetensors"
    ended = forks.run(["checkpoint", str(tmp_path / "run"), "--export-all", str(file)])
    assert "collaboration=False" in ended.out, ended
    with safe_open(file, "pt") as opened:
        arguments = json.loads(opened.metadata()["arguments"])
    network = adaptive.create_model("msdnet", **arguments)
    network.load_state_dict(load_file(file))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for one, other in zip(network.eval()(images), trained.network(images), strict=True):
            torch.testing.assert_close(one, other)


def test_wrong_input_is_one_line_each(run: Path, tmp_path: Path, forks: Forks) -> None:
    existing = tmp_path / "existing.safetensors"
    save_file({"a": torch.zeros(1)}, existing)
    before = existing.read_bytes()
    cases: list[tuple[list[str], list[str]]] = [
        (["nowhere"], ["nowhere is no run folder", "config.yaml"]),
        (["nowhere", "--export", str(tmp_path / "a.safetensors")], ["nowhere is no run folder", "config.yaml"]),
        ([str(run), "--export", "{new}", "--which", "77"], ["no checkpoint '77'", "best, last", "6, 12"]),
        ([str(run), "--export", str(existing)], [f"{existing} exists", "--overwrite"]),
        ([str(run), "--export-all", str(existing)], [f"{existing} exists", "--overwrite"]),
        ([str(run), "--which", "last"], ["--which says nothing about the list", "--export FILE"]),
        ([str(run), "--export", "{new}", "--quick"], ["--quick says nothing about an export", "leave it out"]),
        ([str(run), "--export", str(tmp_path / "a.pth")], ["a.pth", "ends with .safetensors"]),
        ([str(run), "--export", str(tmp_path / "no" / "a.safetensors")], ["there is no folder", "make it first"]),
    ]
    for words, parts in cases:
        ended = forks.run(["checkpoint", *(word.format(new=tmp_path / "new.safetensors") for word in words)])
        line = ended.error_line("checkpoint")
        for part in parts:
            assert part in line
    assert existing.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix) == ["existing.safetensors"]
    assert forks.run(["checkpoint", str(run), "--export", str(existing), "--overwrite"]).code == 0
    assert "fc.weight" in load_file(existing)


def test_a_damaged_checkpoint_is_not_exported(copied: Path, tmp_path: Path, forks: Forks) -> None:
    os.truncate(copied / "checkpoints" / "step-00000006" / "ema.safetensors", 100)
    words = ["checkpoint", str(copied), "--export", str(tmp_path / "new.safetensors"), "--which", "6"]
    line = forks.run(words).error_line("checkpoint")
    assert "step-00000006 is damaged: ema.safetensors has 100 bytes" in line
    assert not (tmp_path / "new.safetensors").exists()
