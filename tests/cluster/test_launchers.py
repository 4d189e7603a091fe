"""Starts that meet trouble which passes, or launchers around launchers, on three nodes: the jobs end trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adaptive.jobs.requeue import read_history
from adaptive.tracking.record import read
from tests.cluster.conftest import running
from tests.cluster.minicluster import REPOSITORY, Cluster, tail
from tests.cluster.test_scripts import stand_in

pytestmark = [pytest.mark.cluster, pytest.mark.full]

STEPS = 6
CONFIG = f"""
model: {{backbone: test_resnet, exits: 2}}
data: {{path: PATH, image_size: 32, workers: 0}}
optimizer: {{lr: 0.05}}
train: {{epochs: 1, max_steps: {STEPS}, global_batch: 60, device: cpu}}
evaluate: {{batch: 100}}
tracking: {{every_steps: 1, gradient_norms: false}}
"""
LISTEN = """
import os, socket, time
server = socket.create_server(("", {port}))
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes."""
    with running(tmp_path_factory, nodes=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(three: Cluster) -> Iterator[Cluster]:
    yield three
    three.heal()


@pytest.fixture
def folder(tmp_path: Path, digits: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG.replace("PATH", json.dumps(str(digits))))
    return tmp_path


@contextmanager
def taken(cluster: Cluster, node: str, port: int) -> Iterator[None]:
    """Let another program listen at a port of a node."""
    words = [str(cluster.home / "mc"), "exec", node, sys.executable, "-c", LISTEN.format(port=port)]
    with subprocess.Popen(words, env=cluster.environment, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        number = program.stdout.readline().strip()  # as the node counts
        try:
            assert number.isdecimal()
            yield
        finally:
            cluster.on(node, "kill", "-KILL", number)


def submit(cluster: Cluster, folder: Path, *words: str, **environment: str) -> int:
    script = REPOSITORY / "slurm" / "train.sbatch"
    options = (*words, "--output", folder / "job.log", script, "run.yaml", f"train.run_folder={folder / 'run'}")
    return cluster.sbatch(*options, cwd=folder, ADAPTIVE_HOME=str(REPOSITORY), **environment)


def expect_trained(folder: Path, launcher: str, world: int) -> None:
    assert read(folder / "run" / "metrics.jsonl")[-1]["step"] == STEPS, tail(folder / "job.log")
    start = json.loads((folder / "run" / "environment.jsonl").read_text().splitlines()[-1])
    assert (start["launcher"], start["world"], start["ranks_here"]) == (launcher, world, 1)


@pytest.mark.ranks
@pytest.mark.skipif(shutil.which("mpirun.openmpi") is None, reason="Open MPI is not installed (Debian: openmpi-bin)")
def test_mpirun_of_open_mpi_trains_on_three_nodes_and_its_log_holds_lines(cluster: Cluster, folder: Path) -> None:
    """Its daemons on the other two nodes are tasks of srun, and its processes see a terminal."""
    names = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
    passed_on = [word for name in names for word in ("-x", name)]
    train = [sys.executable, "-m", "adaptive", "train", "run.yaml", f"train.run_folder={folder / 'run'}"]
    command = " ".join(map(str, ["mpirun.openmpi", "-np", "3", *passed_on, *train]))
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ("--nodes=3", "--ntasks-per-node=1", "--output=job.log", f"--wrap={command}")
    job = cluster.sbatch(*options, cwd=folder, **allowed)
    assert cluster.wait(job) == "COMPLETED", tail(folder / "job.log")
    expect_trained(folder, "mpirun", 3)
    log = (folder / "job.log").read_text()
    assert f"step {STEPS}/{STEPS} " in log
    assert "\x1b[" not in log


@pytest.mark.ranks
def test_a_job_whose_port_is_in_use_is_requeued_and_ends_trained(cluster: Cluster, folder: Path) -> None:
    with taken(cluster, "node0", 29700):
        job = submit(cluster, folder, "--nodes=2", MASTER_PORT="29700")
        cluster.until_logged(folder / "job.log", "requeue: exit code 71 at step 0")
    assert cluster.wait(job) == "COMPLETED", tail(folder / "job.log")
    log = (folder / "job.log").read_text()
    assert "adaptive train: error: MASTER_PORT = 29700 is in use on node0 by process " in log
    assert "Traceback" not in log
    ends = [entry for entry in read_history(folder / "run") if entry["event"] == "end"]
    assert [(entry["exit_code"], entry["decision"]) for entry in ends] == [(71, "requeue"), (0, "done")]
    expect_trained(folder, "srun", 2)


def test_the_batch_script_chooses_a_port_that_is_free(cluster: Cluster, folder: Path) -> None:
    training = 'echo "port <$MASTER_PORT>"; echo 0 > "$ADAPTIVE_RESULTS/rank-0"'
    job = submit(cluster, folder, "--hold", ADAPTIVE_PYTHON=stand_in(folder, training))
    first = 20000 + job % 12000
    with taken(cluster, "node0", first):
        cluster.run("scontrol", "release", str(job))
        assert cluster.wait(job) == "COMPLETED", tail(folder / "job.log")
    assert f"port <{first + 101}>" in (folder / "job.log").read_text()


@pytest.mark.ranks
def test_a_name_that_is_known_a_minute_late_is_waited_for(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "--nodes=2", MASTER_ADDR="the-first-node")
    cluster.until_logged(folder / "job.log", "MASTER_ADDR = 'the-first-node' is not known on node0")
    time.sleep(60)
    address = cluster.on("node0", "hostname", "-I").split()[0]
    with (cluster.state / "etc" / "hosts").open("a") as hosts:
        hosts.write(f"{address} the-first-node\n")
    assert cluster.wait(job) == "COMPLETED", tail(folder / "job.log")
    assert cluster.job(job)["Restarts"] == "0"
    expect_trained(folder, "srun", 2)


@pytest.mark.ranks
def test_deepspeed_for_another_host_says_at_once_that_it_starts_here(cluster: Cluster, folder: Path) -> None:
    deepspeed = Path(sys.executable).with_name("deepspeed")
    hosts = cluster.state / "etc" / "hostfile"
    words = ("--hostfile", hosts, "--include", "node1:0", REPOSITORY / "launcher" / "train.py", "run.yaml")
    began = time.monotonic()
    command = (cluster.home / "mc", "exec", "node0", deepspeed, *words, f"train.run_folder={folder / 'run'}")
    ended = cluster.run(*command, cwd=folder, check=False)
    assert ended.returncode != 0
    assert time.monotonic() - began < 60
    (line,) = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("adaptive train: error")]
    assert "MASTER_ADDR = 10.77.0.11 is no address of node0, where rank 0 runs (it has 10.77.0.10" in line
    assert "deepspeed starts the ranks of a single host where it is called: call it there, or add --force_multi" in line
