"""A run folder and a shard cache on a file system without flock: real commands, below a library that takes it away."""

import errno
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from adaptive import locks
from adaptive.doctor.checks.network import free_port
from adaptive.tracking.record import read
from adaptive.training.checkpoints.store import CheckpointStore
from tests.helpers.noflock import leave_lease, without_flock
from tests.helpers.ranks import rank_environment
from tests.helpers.shard_server import serve
from tests.helpers.waiting import PATIENCE, wait_until

pytestmark = [pytest.mark.chaos, pytest.mark.ranks, pytest.mark.full]

CONFIG = """
model: {backbone: test_resnet, exits: 2}
data: {path: URL, cache: CACHE, image_size: 32, workers: 1}
optimizer: {lr: 0.05}
train: {epochs: 500, global_batch: 64, device: cpu, run_folder: RUN}
checkpoint: {every_steps: 5}
tracking: {every_steps: 1, gradient_norms: false}
"""
# As `adaptive train`, with a patience that a test has.
RANK = """
import sys
from adaptive import locks
locks.LEASE, locks.BEAT = 3.0, 0.5
from adaptive.training import preflight
preflight.occupy.__defaults__ = (1.0, None)
from adaptive.commands.main import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start(config: Path, variables: dict[str, str], world: int = 2, *words: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(config), *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | (rank_environment(rank, world, port) if world > 1 else {}) | variables,
        )
        for rank in range(world)
    ]  # fmt: skip


def step(folder: Path) -> int:
    with suppress(OSError, ValueError, IndexError):
        return int(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


# With the errno of NFS without its lock daemon; tests/test_locks.py shows that the others lead to the same lease.
def test_two_ranks_train_and_nobody_else_does(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache, config = tmp_path / "run", tmp_path / "cache", tmp_path / "run.yaml"
    monkeypatch.setattr(locks, "LEASE", 3.0)
    folder.mkdir()
    for lock in (folder / ".lock", cache / ".room.lock"):
        leave_lease(lock, monkeypatch)  # of a node that has lost power
    variables = without_flock(tmp_path, errno.ENOLCK)
    with serve(digits) as server:
        text = CONFIG.replace("URL", server.url).replace("CACHE", str(cache)).replace("RUN", str(folder))
        config.write_text(text)
        ranks = start(config, variables)
        try:
            wait_until(lambda: step(folder) >= 6 or any(rank.poll() is not None for rank in ranks))
            (colleague,) = start(config, variables, world=1)
            _, err = colleague.communicate(timeout=PATIENCE)
            assert (colleague.returncode, err.count("\n")) == (1, 1), err
            assert f"'{folder}' is in use: process {ranks[0].pid} on " in err
            for rank in ranks:  # nothing is released
                rank.kill()
                rank.communicate()
            newest, _ = CheckpointStore(folder / "checkpoints").newest_valid()
            assert newest is not None
            end = newest.step + 20
            ranks = start(config, variables, 2, f"train.max_steps={end}")
            ended = [rank.communicate(timeout=PATIENCE) for rank in ranks]
            assert [rank.returncode for rank in ranks] == [0, 0], ended
        finally:
            for rank in ranks:
                rank.kill()
        assert f"continuing {folder} from step {newest.step}" in ended[0][0] + ended[0][1]
        assert [record["step"] for record in read(folder / "metrics.jsonl") if "train/loss" in record] == [
            *range(1, end + 1)
        ]
        assert {times for name, times in server.gets().items() if name.endswith(".tar")} == {1}
        assert not list(tmp_path.rglob("*.lease"))
