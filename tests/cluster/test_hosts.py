"""deepspeed --hostfile over ssh, without Slurm: two nodes train as one machine does; who is cut off is named."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive.data.shards.index import load_index, write_index
from adaptive.tracking.record import read
from tests.chaos.runs import Life
from tests.cluster.minicluster import REPOSITORY, Cluster, tail
from tests.end_to_end.test_kill_and_resume import without_clocks

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

END = 40
CONFIG = """
model: {backbone: test_resnet, exits: 2}
data: {path: PATH, image_size: 32, workers: 1}
optimizer: {lr: 0.05}
train: {epochs: 2, global_batch: 64, device: cpu, peer_timeout: 10}
evaluate: {batch: 10}
checkpoint: {every_steps: 10}
tracking: {every_steps: 1, gradient_norms: false, system_seconds: 0.2}
"""


class Launch:
    """A run that the deepspeed command starts on both nodes, from the head node."""

    def __init__(self, cluster: Cluster, config: Path, name: str) -> None:
        self.cluster, self.folder, self.log = cluster, config.with_name(name), config.with_name(f"{name}.log")
        # Of the environment only PYTHON* and the like reach the nodes, besides what this file says.
        handed_on = config.with_name("deepspeed_env")
        names = ("PATH", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS")
        environment = {**cluster.environment, "DS_ENV_FILE": str(handed_on)}
        handed_on.write_text("\n".join(f"{key}={environment[key]}" for key in names if key in environment))
        hosts = cluster.state / "etc" / "hostfile"
        command = [
            *(str(cluster.home / "mc"), "exec", "head", str(Path(sys.executable).with_name("deepspeed"))),
            *("--hostfile", str(hosts), str(REPOSITORY / "launcher" / "train.py"), str(config)),
            f"train.run_folder={self.folder}",
        ]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command, env=environment, cwd=config.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    def told(self) -> str:
        return tail(self.log)

    @property
    def step(self) -> int:
        try:
            return int(read(self.folder / "metrics.jsonl")[-1]["step"])
        except Exception:
            return 0

    def end(self) -> None:
        """As an operator does who has lost a node: the command and what it left on the nodes that live."""
        self.process.kill()
        self.process.wait()
        for node in self.cluster.nodes:
            self.cluster.on(node, "pkill", "-9", "-f", "launcher/train.py", check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    file = tmp_path_factory.mktemp("hosts") / "run.yaml"
    file.write_text(CONFIG.replace("PATH", str(digits)))
    Life(file, file.with_name("whole")).finish()
    return file


@pytest.fixture
def launched(cluster: Cluster, config: Path) -> Iterator[list[Launch]]:
    """What a test starts, so that it is ended."""
    started: list[Launch] = []
    yield started
    for launch in started:
        launch.end()


def expect_the_same(folder: Path, whole: Path) -> None:
    name = f"checkpoints/step-{END:08d}"
    for file in sorted(path.name for path in (whole / name).iterdir()):
        assert (folder / name / file).read_bytes() == (whole / name / file).read_bytes(), f"{file} differs"
    assert without_clocks(read(folder / "metrics.jsonl")) == without_clocks(read(whole / "metrics.jsonl"))


@pytest.mark.full
def test_a_node_that_is_cut_off_is_named_and_the_next_start_ends_as_if_nothing_had_happened(
    cluster: Cluster, config: Path, launched: list[Launch]
) -> None:
    launch = Launch(cluster, config, "run")
    launched.append(launch)
    cluster.until(lambda: launch.step >= 12, 240, launch.told)
    cluster.mc("drop", "node1")  # a silent cut: no connection is closed
    began = time.monotonic()
    words = "adaptive train: error: rank 0 on node0: nothing was heard from rank 1 on node1 for "
    cluster.until_logged(launch.log, words, 90)
    assert time.monotonic() - began < 60
    (line,) = [line for line in launch.log.read_text().splitlines() if words in line]
    assert "it was at step " in line
    assert "(train.peer_timeout = 10): its node or the network is down" in line
    cluster.until(lambda: not cluster.processes("node0", "launcher/train.py"), 60)
    # The other side of the cut ends by itself as well: nobody has to log in there.
    cluster.until(lambda: not cluster.processes("node1", "^[^ ]*python[^ ]* .*train.py --local"), 60)
    launch.end()
    cluster.mc("heal", "node1")
    cluster.until(lambda: cluster.node_states() == {"node0": "idle", "node1": "idle"}, 120)

    again = Launch(cluster, config, "run")
    launched.append(again)
    assert again.process.wait(240) == 0, again.told()
    expect_the_same(launch.folder, config.with_name("whole"))
    nodes = {
        key.split("/")[1] for record in read(launch.folder / "metrics.jsonl") for key in record if "system/" in key
    }
    assert nodes == {"node0", "node1"}


@pytest.mark.full
@pytest.mark.parametrize("what", ["configuration", "dataset"])
def test_a_node_with_other_files_at_the_same_path_ends_the_run(
    what: str, cluster: Cluster, config: Path, launched: list[Launch], digits: Path, tmp_path: Path
) -> None:
    if what == "configuration":
        place, other = config, tmp_path / "other.yaml"
        other.write_text(config.read_text().replace("lr: 0.05", "lr: 0.5").replace("epochs: 2", "epochs: 3"))
    else:
        place, other = digits / "index.json", tmp_path / "dataset" / "index.json"
        other.parent.mkdir()
        index = load_index(digits)
        write_index(other.parent, [*index.classes[:-1], "neuf"], index.splits)
    cluster.on("node1", "mount", "--bind", other, place)
    try:
        launch = Launch(cluster, config, f"other {what}")
        launched.append(launch)
        assert launch.process.wait(240) != 0
    finally:
        cluster.on("node1", "umount", place)
    told = {
        "configuration": "optimizer.lr = 0.05 on node0 (rank 0), 0.5 on node1 (rank 1); also train.epochs = 2 and 3; ",
        "dataset": "the dataset's fingerprint = ",
    }[what]
    lines = [line for line in launch.log.read_text().splitlines() if "error: " in line and told in line]
    assert lines, launch.told()
    assert "on node1 (rank 1)" in lines[0]
    assert not (launch.folder / "metrics.jsonl").exists()
