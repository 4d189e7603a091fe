"""Ranks that were started differently end before the first step, all with one line on what differs and where."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import adaptive.files
from adaptive.data.shards.index import load_index, write_index
from adaptive.doctor.checks.network import free_port
from adaptive.training.supervision.peers import host_name
from tests.helpers.commands import Forks
from tests.helpers.locations import REPOSITORY
from tests.helpers.ranks import rank_environment, run_ranks
from tests.training.setups import config, train_here

SECONDS = 30.0  # in which all ranks have to end; the collective operations' own time-out is half an hour

pytestmark = pytest.mark.ranks


def on_its_own_node(folder: str, what: str, steps: int = 2) -> tuple[str, float]:
    """Train as the only rank of a node, whose local disk is a folder; returns how it ended and after how long.

    The configuration's relative paths lead to other files on each node. ``what`` is another on the second node.
    """
    from adaptive.errors import AdaptiveError

    node = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    os.chdir(f"{folder}/node{node}")
    lr = 0.05
    if node == 1:
        if what == "configuration":
            lr, steps = 0.5, 9
        elif what == "timm":
            sys.path.insert(0, str(Path.cwd() / "versions"))
        elif what == "code":
            adaptive.files.__file__ = str(Path.cwd() / "code" / "adaptive" / "files.py")
    tree = config(
        "dataset",
        "../run" if what != "run folder" else "run",
        model={"weights": "weights.safetensors"} if what == "weights" else {},
        optimizer={"lr": lr},
        train={"max_steps": steps, "global_batch": 128},
        evaluate={"batch": 500},
    )
    began = time.monotonic()
    try:
        train_here(tree)
    except AdaptiveError as error:
        return str(error), time.monotonic() - began
    return "trained", time.monotonic() - began


@pytest.fixture
def nodes(tmp_path: Path, digits: Path) -> Path:
    """A folder with the local disks of two nodes, which hold the same."""
    for node in ("node0", "node1"):
        (tmp_path / node).mkdir()
        (tmp_path / node / "dataset").symlink_to(digits)
    return tmp_path


def expect_refusal(nodes: Path, what: str, *words: str, steps: int = 2) -> None:
    ended = run_ranks(on_its_own_node, 2, str(nodes), what, steps)
    (said, _), (same, _) = ended
    assert same == said
    for word in (f"on {host_name()} (rank 0)", f"on {host_name()} (rank 1)", *words):
        assert word in said
    assert "\n" not in said
    assert max(seconds for _, seconds in ended) < SECONDS


def test_another_configuration(nodes: Path) -> None:
    expect_refusal(nodes, "configuration", "optimizer.lr = 0.05 on", "0.5 on", "also train.max_steps = 2 and 9")
    assert not list(nodes.rglob("metrics.jsonl"))


@pytest.mark.full  # the configuration goes the same way
def test_another_dataset(nodes: Path, digits: Path) -> None:
    other = nodes / "node1" / "dataset"
    other.unlink()
    other.mkdir()
    for shard in digits.glob("*.tar"):
        (other / shard.name).symlink_to(shard)
    index = load_index(digits)
    changed = write_index(other, [*index.classes[:-1], "neuf"], index.splits)
    expect_refusal(
        nodes, "dataset", "the dataset's fingerprint", index.fingerprint[:12], changed.fingerprint[:12], "'dataset'"
    )  # fmt: skip


@pytest.mark.full
def test_another_version_of_timm(nodes: Path) -> None:
    about = nodes / "node1" / "versions" / "timm-0.0.7.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.0.7\n")
    expect_refusal(nodes, "timm", f"the version of timm = {timm.__version__} on", "installed: 0.0.7", "one environment")


@pytest.mark.full
def test_another_code(nodes: Path) -> None:
    copy = nodes / "node1" / "code" / "adaptive"
    shutil.copytree(REPOSITORY / "adaptive", copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "metrics.py").open("a") as file:
        file.write("# mended on this node alone\n")
    expect_refusal(nodes, "code", "adaptive's code (its checksum)", adaptive.files.code_digest(), "the same commit")


@pytest.mark.full
def test_other_weights_to_start_from(nodes: Path) -> None:
    plain = timm.create_model("test_resnet", num_classes=10)
    for node in ("node0", "node1"):
        save_file(plain.state_dict(), nodes / node / "weights.safetensors")
        with torch.no_grad():
            next(plain.parameters()).mul_(1.1)
    expect_refusal(nodes, "weights", "the initial weights", "model.weights")


@pytest.mark.full
def test_another_run_folder_on_resume(nodes: Path) -> None:
    # The first start has nothing to compare: only the first rank writes, to its own node's disk.
    assert [said for said, _ in run_ranks(on_its_own_node, 2, str(nodes), "run folder")] == ["trained"] * 2
    ours, theirs = nodes / "node0" / "run", nodes / "node1" / "run"
    words = ("the run folder = a run to continue on", "no run yet on", "a file system that all nodes share")
    expect_refusal(nodes, "run folder", *words, steps=3)

    shutil.copytree(ours, theirs, dirs_exist_ok=True)
    manifest = theirs / "checkpoints" / "step-00000002" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"score": 77.0}))
    expect_refusal(nodes, "run folder", "see different run folders", "the checkpoint of step 2 with checksum", steps=3)
    manifest.unlink()
    expect_refusal(nodes, "run folder", "a checkpoint of step 2 in which no readable manifest.json", steps=3)


@pytest.mark.full  # tests/chaos goes on with two ranks too
def test_equal_ranks_train_and_go_on(nodes: Path) -> None:
    for steps in (1, 2):
        assert [said for said, _ in run_ranks(on_its_own_node, 2, str(nodes), "nothing", steps)] == ["trained"] * 2


@pytest.mark.parametrize(
    ("refusing", "override", "words"),
    [
        (1, "train.epoch=3", "unknown key train.epoch"),
        pytest.param(0, "data.path=nowhere", "dataset folder nowhere does not exist", marks=pytest.mark.full),
        pytest.param(1, "data.path=nowhere", "dataset folder nowhere does not exist", marks=pytest.mark.full),
    ],
)
def test_a_rank_that_cannot_start_keeps_nobody_waiting(
    refusing: int, override: str, words: str, config_file: Path, tmp_path: Path, forks: Forks
) -> None:
    port = free_port()
    began = time.monotonic()
    ranks = [
        forks.start(
            [
                "train",
                str(config_file),
                f"train.run_folder={tmp_path / 'run'}",
                *([override] if rank == refusing else []),
            ],
            environment=rank_environment(rank, 2, port),
        )
        for rank in range(2)
    ]
    ended = [rank.wait(SECONDS) for rank in ranks]
    assert time.monotonic() - began < SECONDS
    assert [one.code for one in ended] == [1, 1]
    assert all(words in one.err for one in ended), ended
    assert f"rank {refusing} on {host_name()} cannot start: " in ended[1 - refusing].err
