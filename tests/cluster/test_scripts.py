"""What the batch scripts decide, with a program in the place of the training that takes no time."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest

from adaptive.config.loading import load_config
from adaptive.errors import MachineError, UsageError
from adaptive.jobs.requeue import read_history
from adaptive.jobs.submission import Resources, render_evaluation, render_training
from tests.cluster.minicluster import REPOSITORY, Cluster, tail

pytestmark = pytest.mark.cluster

CONFIG = """
model: {backbone: test_resnet}
data: {path: nowhere}
train: {run_folder: run}
"""
SLURM = REPOSITORY / "slurm"


def stand_in(folder: Path, training: str) -> str:
    """A program that is Python, but for adaptive train, which is some lines of bash."""
    program = folder / "stand-in"
    program.write_text(
        f'#!/bin/bash\ncase "$*" in\n*"-m adaptive train "*) {training} ;;\n*) exec {sys.executable} "$@" ;;\nesac\n'
    )
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def test_starts_without_progress_end_by_themselves_and_mistakes_at_once(cluster: Cluster, folder: Path) -> None:
    killed = stand_in(folder, "kill -KILL $$")
    common = {"cwd": folder, "ADAPTIVE_HOME": str(REPOSITORY)}
    guarded = cluster.sbatch(
        *("-o", "guarded.log", SLURM / "train.sbatch", "run.yaml"),
        **common,
        ADAPTIVE_PYTHON=killed,
        ADAPTIVE_MAX_STALLED="2",
    )
    wrong = cluster.sbatch("-N2", "-o", "wrong.log", SLURM / "train.sbatch", "run.yaml", "train.epoch=3", **common)
    lost = cluster.sbatch("-o", "lost.log", SLURM / "train.sbatch", "run.yaml", cwd=folder, ADAPTIVE_HOME=str(folder))
    assert cluster.wait(wrong) == "FAILED"
    assert "run.yaml: unknown key train.epoch; did you mean epochs?" in (folder / "wrong.log").read_text()
    assert (cluster.job(wrong)["Restarts"], cluster.job(wrong)["ExitCode"]) == ("0", "1:0")
    assert cluster.wait(lost) == "FAILED"
    assert "submit from the checkout, or set ADAPTIVE_HOME to it" in (folder / "lost.log").read_text()

    assert cluster.wait(guarded) == "FAILED", tail(folder / "guarded.log")
    assert (cluster.job(guarded)["Restarts"], cluster.job(guarded)["ExitCode"]) == ("1", "137:0")
    assert (
        "stop: 2 starts in a row ended without a checkpoint beyond step 0; mend" in (folder / "guarded.log").read_text()
    )
    ends = [entry for entry in read_history(folder / "run") if entry["event"] == "end"]
    assert [(entry["restart"], entry["exit_code"], entry["decision"]) for entry in ends] == [
        (0, 137, "requeue"),
        (1, 137, "stop"),
    ]


@pytest.mark.full  # minutes of a cluster
def test_the_end_is_noticed_where_srun_waits_for_ever_and_a_cancelled_job_stays_cancelled(
    cluster: Cluster, folder: Path
) -> None:
    training = """
    if [ "$SLURM_PROCID" = 1 ]; then exec sleep 1000; fi
    trap 'exit 75' USR1 TERM
    echo training; until [ -e release ]; do sleep 0.2; done
    echo 0 > "$ADAPTIVE_RESULTS/rank-0" """
    common = {"cwd": folder, "ADAPTIVE_HOME": str(REPOSITORY), "ADAPTIVE_PYTHON": stand_in(folder, training)}
    job = cluster.sbatch("-N2", "-o", "job.log", SLURM / "train.sbatch", "run.yaml", **common, ADAPTIVE_GRACE="1")
    words = ("-N1", "-o", "other.log", SLURM / "train.sbatch", "run.yaml", "train.run_folder=other")
    cancelled = cluster.sbatch(*words, **common)
    cluster.until_logged(folder / "job.log", "training")
    cluster.until_logged(folder / "other.log", "training")
    cluster.run("scancel", str(cancelled))
    step_of = rf"slurmstepd: \[{job}\.0\]"
    cluster.until(lambda: len(cluster.processes("node1", step_of)) == 1)
    [step] = cluster.processes("node1", step_of)
    cluster.on("node1", "kill", "-KILL", str(step))
    (folder / "release").touch()
    assert cluster.wait(job) == "COMPLETED", tail(folder / "job.log")
    assert "rank 0 has ended, srun has not noticed: ending it" in (folder / "job.log").read_text()
    assert read_history(folder / "run")[-1]["decision"] == "done"
    assert cluster.wait(cancelled) == "CANCELLED"
    cluster.until_logged(folder / "other.log", "not requeued: the job is being ended by Slurm or its owner")
    assert cluster.job(cancelled)["Restarts"] == "0"


def test_an_array_trains_one_seed_per_task_and_agents_of_a_sweep_get_its_name(cluster: Cluster, folder: Path) -> None:
    show = stand_in(folder, 'printf "trains <%s>\\n" "${@:3}"; echo 0 > "$ADAPTIVE_RESULTS/rank-0"')
    common = {"cwd": folder, "ADAPTIVE_HOME": str(REPOSITORY)}
    modules, setup = folder / "modules.sh", folder / "set up.sh"
    modules.write_text('module() { echo "module $*"; }\n')  # as on clusters whose bash knows it from the start
    setup.write_text(f"export ADAPTIVE_PYTHON='{show}'\n")
    seeds = cluster.sbatch(
        *("--array=0-1", "-J", "study", "-o", "seed-%a.log", SLURM / "array.sbatch", "run.yaml", "optimizer.lr=0.3"),
        **common,
        BASH_ENV=str(modules),
        ADAPTIVE_MODULES="cuda/12 gcc/13",
        ADAPTIVE_SETUP=str(setup),
        ADAPTIVE_SRUN="--quiet --label",
        ADAPTIVE_CONTAINER="nice -n 1",
    )
    agent = folder / "agent"
    agent.write_text('#!/bin/bash\nprintf "<%s>" "$@"\n')
    agent.chmod(0o755)
    sweep = cluster.sbatch(
        "--array=1", "-o", "sweep.log", SLURM / "sweep.sbatch", "me/it/abc", **common, ADAPTIVE_PYTHON=str(agent)
    )
    for task in (0, 1):
        assert cluster.wait(f"{seeds}_{task}") == "COMPLETED", tail(folder / f"seed-{task}.log")
        run = Path("run") / f"seed-{task}"
        log = (folder / f"seed-{task}.log").read_text()
        assert f"0: trains <{run / '.slurm' / 'config.yaml'}>" in log
        assert "module load cuda/12 gcc/13" in log
        config = load_config(folder / run / ".slurm" / "config.yaml")
        assert (config.train.seed, config.train.run_folder, config.optimizer.lr) == (task, str(run), 0.3)
        assert config.tracking.group == f"study-{seeds}"
        assert read_history(folder / run)[-1]["decision"] == "done"
    assert cluster.wait(f"{sweep}_1") == "COMPLETED"
    assert (folder / "sweep.log").read_text() == "<-m><wandb><agent><--count><1><me/it/abc>"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_rendered_scripts_are_sound_for_bash_and_for_sbatch(cluster: Cluster, folder: Path) -> None:
    first = cluster.sbatch("--hold", "--wrap=true", cwd=folder)
    shapes = [
        {},
        {"nodes": 2, "ranks_per_node": 4, "cpus_per_rank": 2, "time": "1-00:00:00"},
        {"gpus": False, "time": "30", "requeue": False, "after": str(first), "extra": ("--exclusive", "--mem=0")},
        {
            "seeds": "0-4%2",
            "options": (("mail-user", "a@b.c"), ("mail-type", "END,FAIL"), ("comment", 'it\'s "x" # $(y)')),
        },
    ]
    runs = ["run", "two words", 'it\'s "quoted" $(touch EXECUTED) `touch EXECUTED` #1 100 % \u00fc\u4e2d']
    scripts = []
    for number, (shape, run) in enumerate(itertools.product(shapes, runs)):
        config = load_config(folder / "run.yaml", [f"train.run_folder={json.dumps(str(folder / run))}"])
        resources = Resources(name=run, **shape)
        texts = {
            "train": render_training(config, resources),
            "evaluate": render_evaluation(config, resources, str(first)),
        }
        for kind, text in texts.items():
            scripts.append(folder / f"{number}-{kind}.sbatch")
            scripts[-1].write_text(text)
    cluster.run("shellcheck", *scripts)
    for script in scripts:
        tested = cluster.run("sbatch", "--test-only", script, cwd=folder)
        assert "to start at" in tested.stderr, tested
    assert not list(folder.rglob("EXECUTED"))
    config = load_config(folder / "run.yaml", ['train.run_folder="a\\nb"'])
    with pytest.raises(UsageError, match="line break"):
        render_training(config, Resources())


def test_what_sbatch_refuses_is_told_in_its_own_words(
    cluster: Cluster, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adaptive.jobs.submission import slurm

    monkeypatch.setenv("PATH", cluster.environment["PATH"])
    with pytest.raises(MachineError, match="sbatch refused: error: invalid partition specified: nowhere"):
        slurm("sbatch", "--partition=nowhere", "--wrap=true")
