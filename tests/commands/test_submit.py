import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive.commands.main import main
from adaptive.config.loading import load_config
from adaptive.errors import MachineError, UsageError
from adaptive.files import code_root, code_sources
from adaptive.jobs import code_version, submission
from adaptive.jobs.code_version import copy_code, write_code_version
from adaptive.jobs.submission import (
    Resources,
    check_time,
    freeze,
    memory_is_said,
    nodes_have_memory,
    render_training,
    seconds,
    seed_numbers,
    slurm,
    submitting,
)
from tests.helpers.commands import Forks
from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("12:00:00", 43200),
        ("1-0", 86400),
        ("1-02:30", 95400),
        ("0", None),
        ("infinite", None),
    ],
)
def test_times_as_slurm_writes_them(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1h", "1:2:3:4", "-5", "12:00:00\n#SBATCH --uid=0"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--time .* is no time of Slurm's"):
        seconds(text)


def test_seeds_are_what_slurm_numbers_an_array_with() -> None:
    assert seed_numbers("0-4") == [0, 1, 2, 3, 4]
    assert seed_numbers("1,5,9-11,5%2") == [1, 5, 9, 10, 11]
    assert seed_numbers("0-8:4") == [0, 4, 8]
    for text in ("", "a", "4-0", "1;2", "1%", "0-99999999", "1 2"):
        with pytest.raises(UsageError, match="--seeds"):
            seed_numbers(text)


def test_the_warning_comes_in_time_whatever_the_limit(config_file: Path) -> None:
    config = load_config(config_file)
    for time, line in ((None, "@300"), ("24:00:00", "@300"), ("8", "@120"), ("0:2", "@1")):
        assert f"#SBATCH --signal=B:USR1{line}\n" in render_training(config, Resources(time=time))


@pytest.mark.parametrize(
    ("time", "extra", "line"),
    [
        ("2", (), "--time 2: the signal to save comes 30 s before the end, and up to 60 s early: the job"),
        ("10", ("--signal=B:USR1@600",), "comes 600 s before the end (--sbatch-option=--signal=B:USR1@600), and"),
        ("5:00", ("--signal USR1@200",), "give 6 minutes or more, or a later signal"),
    ],
)
def test_a_time_limit_that_is_over_before_the_run_begins_is_refused(time: str, extra: tuple, line: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_time(Resources(time=time, extra=extra))
    assert line in str(refused.value)
    check_time(Resources(time=time, extra=extra, requeue=False))  # it ends there


@pytest.mark.parametrize("time", [None, "0", "3", "24:00:00"])
def test_time_limits_that_leave_time_to_train_are_taken(time: str | None) -> None:
    check_time(Resources(time=time))


@pytest.mark.full
def test_the_seeds_starts_and_ends_are_where_it_says(config_file: Path, tmp_path: Path, forks: Forks) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 77\n")
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}"
    for seeds, place in (("0-1", "seed-SEED/requeues.jsonl"), (None, "requeues.jsonl")):
        run = tmp_path / f"run {seeds}"
        words = [
            "submit",
            str(config_file),
            "--cpu",
            f'train.run_folder="{run}"',
            *(["--seeds", seeds] if seeds else []),
        ]
        ended = forks.start(words, PATH=path).wait()
        assert f"status     squeue -j 77; starts and ends: {run}/{place}\n" in ended.out, ended


def test_settings_of_the_scripts_stay_what_they_were(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(config_file)
    script = render_training(config, Resources())
    assert f"export ADAPTIVE_PYTHON={sys.executable}\n" in script
    monkeypatch.setenv("ADAPTIVE_CONTAINER", "apptainer exec --nv it's.sif")
    script = render_training(config, Resources(gpus=False))
    assert "export ADAPTIVE_CONTAINER='apptainer exec --nv it'\"'\"'s.sif'\n" in script
    assert "ADAPTIVE_PYTHON" not in script  # the container's own
    assert "gpus" not in script


def test_dry_run_shows_the_script_and_writes_nothing(config_file: Path, forks: Forks, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    words = [
        "submit",
        str(config_file),
        "--nodes",
        "2",
        f'train.run_folder="{run}"',
        "--gpus-per-node",
        "4",
        "--dry-run",
    ]
    ended = forks.run(words)
    assert ended.code == 0, ended
    lines = ended.out.splitlines()
    assert "#SBATCH --nodes=2" in lines
    assert "#SBATCH --gpus-per-node=4" in lines
    assert lines[-1] == f"train '{run}/submitted/config.yaml'"
    assert not run.exists()
    both = json.loads(forks.run([*words, "--json", "--evaluate"]).out)
    assert both["script"] == ended.out
    assert f"evaluate '{run}'" in both["evaluate_script"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--nodes", "3"], "train.global_batch = 64 is not divisible by 3 ranks; use 2 ranks, the largest"),
        (["data.path=/nowhere"], "data.path = '/nowhere': "),
        (["model.backbone=resnet19"], "model.backbone = 'resnet19'"),
        (["train.exit_weights=[1,2]"], "train.exit_weights"),
        (["train.epoch=1"], "unknown key train.epoch"),
        (["train.run_folder=/proc/run"], "train.run_folder = '/proc"),
        (['train.run_folder="/tmp/a:b"'], "no code below a name with a colon; choose another folder"),
        (["optimizer.lr=0.3", "train.run_folder=EXISTING"], "holds a run with optimizer.lr = 0.1, now it is 0.3"),
    ],
)
def test_what_would_fail_on_the_cluster_fails_here(
    config_file: Path, existing_run: Path, forks: Forks, words: list[str], line: str
) -> None:
    words = [word.replace("EXISTING", str(existing_run)) for word in words]
    assert line in forks.run(["submit", str(config_file), "--cpu", "--dry-run", *words]).error_line("submit")


@pytest.mark.parametrize(
    "words",
    [["--cpu", "--gpus-per-node=2"], ["--ranks-per-node=2"], ["--after=x"], ["--sbatch-option=--a\n#SBATCH --b"]],
)
def test_options_that_do_not_fit_together_are_refused(config_file: Path, forks: Forks, words: list[str]) -> None:
    ended = forks.run(["submit", str(config_file), "--dry-run", *words])
    assert (ended.code, ended.err.count("\n")) == (2, 1)


def test_without_slurm_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="sbatch not found; submit on a machine of the cluster"):
        slurm("sbatch", "--parsable", "x")


def test_later_changes_reach_no_submitted_job(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    copy_code(checkout)
    (checkout / "adaptive" / "__pycache__").mkdir()
    monkeypatch.setattr(code_version, "code_root", lambda: checkout)
    config = load_config(config_file, ["tracking.name='$(x)'"])
    script = freeze({"config.yaml": config}, tmp_path / "run", "echo\n")
    frozen = script.parent
    assert not list(frozen.rglob("__pycache__"))
    (checkout / "adaptive" / "commands" / "train.py").write_text("raise SystemExit(3)\n")
    (checkout / "slurm" / "lib.sh").write_text("exit 3\n")
    assert load_config(frozen / "config.yaml") == config
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "adaptive", "train", frozen / "config.yaml", "--print-config"],
        capture_output=True,
        text=True,
        check=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(frozen / "code")},
    )
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    assert load_config(tmp_path / "shown.yaml") == config
    assert (frozen / "code" / "slurm" / "lib.sh").read_text() == (REPOSITORY / "slurm" / "lib.sh").read_text()


def test_the_code_version_names_commit_and_differences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout, folder = tmp_path / "checkout", tmp_path / "run"
    copy_code(checkout)
    folder.mkdir()
    monkeypatch.setattr(code_version, "code_root", lambda: checkout)
    assert write_code_version(folder)["commit"] is None

    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        return subprocess.run(
            ["git", *identity, *words], cwd=checkout, capture_output=True, text=True, check=True
        ).stdout

    git("init", "-q", "-b", "work")
    git("add", ".")
    git("commit", "-qm", "x")
    about = write_code_version(folder)
    assert (about["commit"], about["branch"], about["dirty"]) == (git("rev-parse", "HEAD").strip(), "work", False)
    assert not (folder / "code.diff").exists()
    (checkout / "adaptive" / "errors.py").write_text("changed = 1\n")
    assert write_code_version(folder)["changed"] == [" M adaptive/errors.py"]
    assert "+changed = 1" in (folder / "code.diff").read_text()
    assert json.loads((folder / "code_version.json").read_text())["dirty"] is True


@pytest.fixture
def slurm_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Slurm that takes every job, numbers them, and keeps them waiting; returns the list of scripts."""
    programs = tmp_path / "programs"
    programs.mkdir()
    taken = tmp_path / "taken"
    lines = {"sbatch": f"echo $2 >> {taken}; wc -l < {taken}", "squeue": f"test -e {taken} && echo PENDING"}
    for name, line in lines.items():
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return taken


def submit(words: list[str]) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["submit", *words])
    return ended.value.code


def whole(code: Path) -> None:
    assert sorted(p.relative_to(code) for p in (code / "adaptive").rglob("*.py")) == sorted(
        p.relative_to(code_root()) for p in code_sources()
    )


@pytest.mark.full
def test_of_two_submits_into_one_folder_one_is_refused(
    config_file: Path, slurm_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    words = [str(config_file), "--cpu", f"train.run_folder={tmp_path / 'run'}"]
    copy, codes = submission.copy_code, []

    def slowly(folder: Path) -> None:
        monkeypatch.setattr(submission, "copy_code", copy)
        codes.append(submit(words))
        copy(folder)

    monkeypatch.setattr(submission, "copy_code", slowly)
    codes.append(submit(words))
    assert codes == [1, 0]
    assert "is being submitted by another adaptive submit" in capsys.readouterr().err
    assert len(slurm_programs.read_text().splitlines()) == 1
    whole(tmp_path / "run" / "submitted" / "code")
    assert submit(words) == 1  # the job is in the queue
    assert "belongs to job 1 (pending)" in capsys.readouterr().err


def test_what_a_job_runs_stays_until_the_new_copy_is_whole(tmp_path: Path, config_file: Path, monkeypatch) -> None:
    config = load_config(config_file)
    with submitting(tmp_path / "run"):
        frozen = freeze({"config.yaml": config}, tmp_path / "run", "echo 1\n").parent
    copy = submission.copy_code

    def fails(folder: Path) -> None:
        whole(frozen / "code")
        assert (frozen / "job.sbatch").read_text() == "echo 1\n"
        copy(folder)
        (folder / "adaptive" / "__init__.py").unlink()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(submission, "copy_code", fails)
    refusal = r"submitted cannot be written: .*No space left"
    with submitting(tmp_path / "run"), pytest.raises(MachineError, match=refusal):
        freeze({"config.yaml": config}, tmp_path / "run", "echo 2\n")
    whole(frozen / "code")
    assert (frozen / "job.sbatch").read_text() == "echo 1\n"
    assert [path.name for path in (tmp_path / "run").iterdir() if "submit" in path.name] == ["submitted"]


@pytest.mark.full
def test_a_submit_that_was_killed_is_tidied_by_the_next(tmp_path: Path, config_file: Path) -> None:
    config, folder = load_config(config_file), tmp_path / "run"
    freeze({"config.yaml": config}, folder, "echo 1\n")

    def die(event: int) -> None:
        count = itertools.count()

        def watch(kind: str, arguments: object) -> None:
            if kind == "os.rename" and "submit" in str(arguments) and next(count) == event:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        with submitting(folder):
            freeze({"config.yaml": config}, folder, "echo 2\n")

    for event in itertools.count():
        process = multiprocessing.get_context("fork").Process(target=die, args=(event,))
        process.start()
        process.join(PATIENCE)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        with submitting(folder):
            script = freeze({"config.yaml": config}, folder, "echo 3\n")
        assert script.read_text() == "echo 3\n"
        whole(script.parent / "code")
        assert [path.name for path in folder.iterdir() if "submit" in path.name] == ["submitted"]
    assert event >= 2


def test_a_job_asks_for_the_memory_that_its_ranks_take(
    config_file: Path, forks: Forks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm, whose nodes it would be asked for
    words = [str(config_file), "--ranks-per-node", "2", "--cpu", "--dry-run", f"train.run_folder={tmp_path / 'run'}"]
    asked = [line for line in forks.run(["submit", *words]).out.splitlines() if "--mem" in line]
    planned = json.loads(forks.run(["plan", *words[:1], "--gpus-per-node=2", words[-1], "--json"]).out)
    assert asked == [f"#SBATCH --mem={-(-(planned['host_memory']['node'] * 5 // 4) // 2**20)}M"]
    own = forks.run(["submit", *words, "--sbatch-option=--mem-per-cpu=3G"]).out
    assert [line for line in own.splitlines() if "--mem" in line] == ["#SBATCH --mem-per-cpu=3G"]


@pytest.mark.parametrize(
    ("extra", "variable", "said"),
    [
        ([], "", False),
        (["--exclude=node7", "--mem-bind=local"], "", False),
        (["--mem=0"], "", True),
        (["--mem 8G"], "", True),
        (["--mem-per-gpu=8G"], "", True),
        ([], "SBATCH_MEM_PER_NODE", True),
    ],
)
def test_memory_that_the_user_has_asked_for(
    extra: list[str], variable: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "4G")
    assert memory_is_said(extra) == said


@pytest.mark.parametrize(("told", "known"), [("256000\n64000+", True), ("1", False), ("", True)])
def test_nodes_whose_memory_slurm_does_not_know(
    told: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sinfo"
    program.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert nodes_have_memory() == known
