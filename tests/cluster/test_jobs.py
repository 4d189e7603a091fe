"""Training jobs that are preempted, signalled, cut off and moved end as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptive.config.loading import load_config
from adaptive.jobs.requeue import read_history
from adaptive.tracking.record import read
from tests.chaos.runs import Life
from tests.cluster.minicluster import REPOSITORY, Cluster, tail
from tests.end_to_end.test_kill_and_resume import without_clocks
from tests.helpers.commands import Forks

pytestmark = [pytest.mark.cluster, pytest.mark.ranks]

END = 60
ASKED = "USR1: the ranks are asked"
NASTY = (
    'it\'s "quoted" $(touch EXECUTED) `touch EXECUTED` ; touch EXECUTED & | * {a,b} \\ %j #SBATCH\nline 2 \u00fc\u4e2d'
)
# The page that the history ends in, and all others.
FILL = """
history=$1/run/requeues.jsonl
head -c $((4096 - $(stat -c %s "$history") % 4096)) /dev/zero | tr '\\0' '\\n' >> "$history"
cat /dev/zero > "$1/filling"
"""
CONFIG = """
model: {backbone: test_resnet, exits: 2}
data: {path: PATH, image_size: 32, crop: none, flip: 0.0, workers: 0}
optimizer: {lr: 0.05}
train: {epochs: 3, global_batch: 64, device: cpu, zero_stage: 1}
evaluate: {batch: 100}
checkpoint: {every_steps: 10}
tracking: {every_steps: 1, gradient_norms: false, name: NAME}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Where jobs are submitted."""
    folder = tmp_path_factory.mktemp("jobs") / "it's a $HOME folder"
    folder.mkdir()
    text = CONFIG.replace("PATH", json.dumps(str(digits))).replace("NAME", json.dumps(NASTY))
    (folder / "run config.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same, with what the jobs of one node would be on this machine."""
    Life(folder / "run config.yaml", folder / "whole-1", 1).finish()
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    """The same, with what the jobs of two nodes would be on this machine, on two ranks."""
    Life(folder / "run config.yaml", folder / "whole-2", 2).finish()
    return folder


def sbatch_training(
    cluster: Cluster, folder: Path, log: Path, *options: str, overrides: list[str], **environment: str
) -> int:
    """Submit this checkout's train.sbatch from ``folder`` and return the job's id."""
    script = REPOSITORY / "slurm" / "train.sbatch"
    words = [*options, "--output", log, script, "run config.yaml", *overrides]
    return cluster.sbatch(*words, cwd=folder, ADAPTIVE_HOME=str(REPOSITORY), **environment)


def training(having: str) -> str:
    """Return a pattern for the command lines of ranks that hold some words."""
    return rf"^\S*python\S* .*-m adaptive train .*{having}"


def expect_equal(run: Path, whole: Path) -> None:
    name = f"checkpoints/step-{END:08d}"
    files = sorted(path.name for path in (whole / name).iterdir())
    assert "weights.safetensors" in files
    for file in files:
        assert (run / name / file).read_bytes() == (whole / name / file).read_bytes(), f"{file} differs"
    assert without_clocks(read(run / "metrics.jsonl")) == without_clocks(read(whole / "metrics.jsonl"))


def expect_nothing_executed(folder: Path) -> None:
    assert not list(folder.rglob("EXECUTED"))
    assert not (Path.home() / "EXECUTED").exists()


def decisions(run: Path) -> list[tuple[int, str]]:
    return [(entry["exit_code"], entry["decision"]) for entry in read_history(run) if entry["event"] == "end"]


@pytest.mark.full
def test_two_nodes_and_a_signal_leave_the_same_weights_as_one_machine(cluster: Cluster, undisturbed: Path) -> None:
    folder = undisturbed
    tags = ["two words", "a \"b\" 'c' $(touch EXECUTED)", "\u00fc\u4e2d"]
    overrides = ["train.run_folder=signalled 'run'", "tracking.tags=[" + ",\n".join(map(json.dumps, tags)) + "]"]
    log = folder / "signalled.log"
    job = sbatch_training(cluster, folder, log, "--nodes=2", overrides=overrides, ADAPTIVE_STAGE="/tmp/stage")
    with cluster.standing_still(job, training("run_folder=signalled"), log, " step 5/"):
        cluster.run("scancel", "--batch", "--signal=USR1", str(job))
        cluster.until_logged(log, ASKED)

    assert cluster.wait(job) == "COMPLETED", tail(log)
    run = folder / "signalled 'run'"
    assert decisions(run) == [(75, "requeue"), (0, "done")]
    assert 5 <= read_history(run)[2]["step"] < END
    expect_equal(run, folder / "whole-2")
    saved = load_config(run / "config.yaml").tracking
    assert (saved.name, saved.tags) == (NASTY, tags)
    brought = [line.split(": ", 1) for line in log.read_text().splitlines() if " shards in /tmp/stage" in line]
    assert sorted(node for node, _ in brought) == ["node0", "node0", "node1", "node1"]
    assert sum(" 0 of them brought now" in words for _, words in brought) == 2  # the second start
    assert cluster.on("node1", "find", "/tmp/stage", "-name", "*.tar")
    expect_nothing_executed(folder)


@pytest.mark.full
def test_a_time_limit_leaves_the_same_weights_as_one_machine(cluster: Cluster, alone: Path) -> None:
    folder = alone
    log = folder / "limited.log"
    overrides = ["train.run_folder=limited"]
    options = ("--time=30", "--signal=B:USR1@50")
    job = sbatch_training(cluster, folder, log, *options, overrides=overrides)
    with cluster.standing_still(job, training("run_folder=limited"), log, " step 5/"):
        # However slow the machine is, the limit comes near at step 5, and not again in the second life.
        cluster.limit(job, minutes=2)
        cluster.until_logged(log, ASKED, 240)
        cluster.limit(job, minutes=60)
    assert cluster.wait(job) == "COMPLETED", tail(log)
    assert decisions(folder / "limited") == [(75, "requeue"), (0, "done")]
    expect_equal(folder / "limited", folder / "whole-1")
    expect_nothing_executed(folder)


@pytest.mark.full
def test_a_preempted_job_goes_on_elsewhere_and_is_measured_when_it_is_done(
    cluster: Cluster, alone: Path, tmp_path: Path
) -> None:
    folder = alone
    run = folder / 'sub "mitted" $(touch EXECUTED)'
    words = ["submit", "run config.yaml", "--cpu", "--time=9", f"train.run_folder={json.dumps(run.name)}", "--evaluate"]
    # Forked from where Life's ranks are: the slow imports are done there.
    submitted = Forks(tmp_path).start([*words, "--json"], folder, cluster.environment).wait()
    assert submitted.code == 0, submitted
    told = json.loads(submitted.out.splitlines()[-1])
    job, log = told["job"], Path(told["log"])
    assert log == run / f"slurm-{job}.log"
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/bash\nuntil [ -e release ]; do sleep 0.2; done\n")
    with cluster.standing_still(job, training("submitted/"), log, " step 5/") as (node,):
        (tmp_path / "again").mkdir()
        again = Forks(tmp_path / "again").start([*words, "--json"], folder, cluster.environment)
        refusal = again.wait().error_line("submit")
        guest = cluster.sbatch("--partition=urgent", f"--nodelist={node}", "--exclusive", urgent, cwd=folder)
        cluster.until_logged(log, ASKED)
    cluster.until(lambda: cluster.job(job)["JobState"] == "RUNNING" and cluster.job(job)["NodeList"] not in ("", node))
    assert cluster.job(guest)["JobState"] == "RUNNING"
    (folder / "release").touch()

    assert f"belongs to job {job} (" in refusal
    assert f"scancel {job} first, or choose another folder" in refusal
    assert cluster.wait(job) == "COMPLETED", tail(log)
    assert decisions(run) == [(75, "requeue"), (0, "done")]
    nodes = [entry["nodes"] for entry in read_history(run) if entry["event"] == "start"]
    assert nodes == [node, "node1" if node == "node0" else "node0"]
    expect_equal(run, folder / "whole-1")
    assert load_config(run / "config.yaml") == load_config(
        folder / "run config.yaml", [f"train.run_folder={json.dumps(run.name)}"]
    )
    about = json.loads((run / "code_version.json").read_text())
    assert about["commit"] is None or len(about["commit"]) == 40
    assert cluster.wait(told["evaluate_job"]) == "COMPLETED", tail(run / f"slurm-{told['evaluate_job']}.log")
    assert json.loads((run / "evaluation_test.json").read_text())["checkpoint"].startswith("step-")
    expect_nothing_executed(folder)


@pytest.mark.full
def test_a_disk_that_is_full_at_a_preempted_job_s_end_does_not_keep_it_from_being_trained(
    cluster: Cluster, alone: Path
) -> None:
    """Neither the last checkpoint nor the note of the end nor the ranks' exit codes have room on it."""
    folder, disk = alone, alone / "disk"
    disk.mkdir()
    log = folder / "full.log"
    cluster.on("node0", "mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk)  # the node's own
    try:
        job = sbatch_training(cluster, folder, log, "--nodelist=node0", overrides=["train.run_folder=disk/run"])
        with cluster.standing_still(job, training("run_folder=disk/run"), log, " step 15/"):
            cluster.on("node0", "sh", "-c", FILL, "sh", disk, check=False)
            cluster.run("scancel", "--batch", "--signal=USR1", str(job))
            cluster.until_logged(log, ASKED)
        cluster.until_logged(log, "requeueing")
        cluster.on("node0", "rm", disk / "filling")
        assert cluster.wait(job) == "COMPLETED", tail(log)
        cluster.on("node0", "cp", "-r", disk / "run", folder / "full")
    finally:
        cluster.on("node0", "umount", "-l", disk, check=False)
    text = log.read_text()
    assert "not saved: " in text
    assert "requeues.jsonl cannot be written: No space left on device" in text
    assert decisions(folder / "full") == [(0, "done")]
    name = f"checkpoints/step-{END:08d}/weights.safetensors"
    assert (folder / "full" / name).read_bytes() == (folder / "whole-1" / name).read_bytes()
    expect_nothing_executed(folder)


@pytest.mark.full
def test_a_node_that_dies_is_named_and_its_job_goes_on_when_it_is_back(cluster: Cluster, undisturbed: Path) -> None:
    folder = undisturbed
    log, run = folder / "died.log", folder / "died"
    job = sbatch_training(cluster, folder, log, "--nodes=2", overrides=["train.run_folder=died"])
    with cluster.standing_still(job, training("run_folder=died"), log, " step 21/"):
        cluster.mc("kill", "node1")  # no goodbye: nothing closes its connections
    cluster.until(lambda: cluster.job(job)["JobState"] == "PENDING", 90, lambda: str(cluster.job(job)))
    cluster.until_logged(log, "Node failure on node1")
    cluster.power_on("node1")
    assert cluster.wait(job) == "COMPLETED", tail(log)
    assert cluster.job(job)["Restarts"] == "1"
    assert decisions(run) == [(0, "done")]  # Slurm itself ended the first start
    first, second = [entry["step"] for entry in read_history(run) if entry["event"] == "start"]
    assert first == 0
    assert 10 <= second < END
    expect_equal(run, folder / "whole-2")
