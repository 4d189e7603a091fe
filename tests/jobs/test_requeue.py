import errno
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive import passing_faults
from adaptive.config.loading import load_config
from adaptive.errors import ConfigError, MachineError, TrainingError
from adaptive.jobs import requeue
from adaptive.jobs.requeue import begin, end, leave_exit_code, outcome, read_history, stalled
from tests.helpers.disks import fill, small_disk


def save(folder: Path, step: int) -> Path:
    """A published checkpoint, as far as its manifest goes."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")
    files = {"state.json": {"bytes": 2, "sha256": "0" * 64}}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "step": step, "files": files}))
    return path


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_RESTART_COUNT", "ADAPTIVE_MAX_STALLED"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{backbone: resnet18}}\ndata: {{path: x}}\ntrain: {{run_folder: {tmp_path}/run}}\n")
    return file


def start(config: Path, restart: int, code: int, monkeypatch: pytest.MonkeyPatch, step: int | None = None) -> str:
    """One start of the job: its steps, its end; returns what is decided."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    folder = Path(begin([str(config)], None, None)[0])
    if step is not None:
        save(folder / "checkpoints", step)
    return end(folder, code, asked=False)[0]


@pytest.mark.parametrize(
    ("results", "launcher", "asked", "code"),
    [
        ({0: 0}, 0, False, 0),
        ({0: 0}, 143, False, 0),  # srun was ended after rank 0
        ({0: 75, 1: 75}, 75, False, 75),
        ({0: 75}, 137, False, 75),
        ({0: 1, 1: 1}, 143, False, 1),  # those that srun killed after the first failure count for nothing
        ({0: 69, 1: 1}, 69, False, 1),  # one failed, the other missed it
        ({0: 69}, 137, False, 69),
        ({}, 137, False, 137),
        ({}, 143, True, 75),  # asked before the first step
        ({}, 1, False, 1),
        ({0: 2}, 2, True, 2),
    ],
)
def test_what_a_start_came_to(results: dict[int, int], launcher: int, asked: bool, code: int) -> None:
    assert outcome(results, launcher, asked) == code


def test_as_long_as_it_gets_on_a_job_is_requeued_and_then_not_for_ever(config, monkeypatch, tmp_path) -> None:
    assert start(config, 0, 75, monkeypatch) == "requeue"
    assert start(config, 1, 137, monkeypatch) == "requeue"
    assert start(config, 2, 75, monkeypatch, step=4) == "requeue"  # the count begins anew
    assert start(config, 3, 70, monkeypatch) == "requeue"
    assert start(config, 4, 69, monkeypatch) == "requeue"
    assert start(config, 5, 137, monkeypatch) == "stop"
    history = read_history(tmp_path / "run")
    assert history[-1]["reason"].startswith(
        "3 starts in a row ended without a checkpoint beyond step 4; mend the cause"
    )
    assert [entry["restart"] for entry in history if entry["event"] == "start"] == list(range(6))
    # A human mended it and started the job, or another one, again.
    assert start(config, 6, 75, monkeypatch) == "requeue"
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert start(config, 0, 75, monkeypatch) == "requeue"


def test_errors_and_good_ends_are_final(config, monkeypatch) -> None:
    assert start(config, 0, 1, monkeypatch) == "stop"
    assert start(config, 0, 2, monkeypatch) == "stop"
    assert start(config, 0, 0, monkeypatch) == "done"


def test_faults_that_pass_are_no_mistakes(config, monkeypatch) -> None:
    assert start(config, 0, 71, monkeypatch) == "requeue"
    assert start(config, 1, 71, monkeypatch) == "requeue"
    assert start(config, 2, 71, monkeypatch) == "stop"  # a bound as for all that bring no progress


def test_a_configuration_that_cannot_be_read_for_a_moment_is_no_mistake(config, monkeypatch, capsys) -> None:
    monkeypatch.setattr(passing_faults, "PATIENCE", 0.0)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", fail)
    monkeypatch.setattr(sys, "argv", ["requeue.py", "begin", "--", str(config)])
    assert requeue.main() == 71
    assert "run.yaml cannot be read: Stale file handle" in capsys.readouterr().err


def test_a_job_shorter_than_its_signal_s_lead_does_not_go_on_ten_steps_at_a_time(config, monkeypatch, tmp_path) -> None:
    """Each start saves something; without end, since the signal comes as soon as it has begun."""
    told = []
    for restart in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        folder = Path(begin([str(config)], None, None)[0])
        save(folder / "checkpoints", 10 * (restart + 1))
        told.append(end(folder, 75, asked=True, after=25, limit=300)[0])
    assert told[:3] == ["requeue", "requeue", "stop"]
    reasons = [entry["reason"] for entry in read_history(folder) if entry["event"] == "end"]
    assert reasons[2] == (
        "asked to stop 25 s after the start, with a time limit of 300 s (3 starts in a row), at step 30; give a longer "
        "--time, or a signal closer to its end (--signal=B:USR1@75)"
    )
    assert told[3] == "requeue", "a human started it again"


@pytest.mark.parametrize(("after", "limit"), [(225, 300), (25, 86400), (25, None)])
def test_a_signal_that_comes_in_time_and_preemption_are_no_reason_to_stop(config, monkeypatch, after, limit) -> None:
    for restart in range(5):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        folder = Path(begin([str(config)], None, None)[0])
        save(folder / "checkpoints", restart + 1)
        assert end(folder, 75, asked=True, after=after, limit=limit)[0] == "requeue"


def test_starts_that_slurm_repeats_by_itself_are_counted_too(config, monkeypatch) -> None:
    """A node that dies takes the batch script with it: there is no end to decide at."""
    monkeypatch.setenv("ADAPTIVE_MAX_STALLED", "2")
    for restart in (0, 1):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        begin([str(config)], None, None)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(TrainingError, match="2 starts in a row ended without a checkpoint beyond step 0"):
        begin([str(config)], None, None)
    begin([str(config)], None, None)  # again by a human


def test_damaged_checkpoints_and_lines_count_for_nothing(config, monkeypatch, tmp_path) -> None:
    folder = tmp_path / "run"
    save(folder / "checkpoints", 2)
    whole = save(folder / "checkpoints", 4)
    (whole / "manifest.json").write_text("{")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    begin([str(config)], None, None)
    with (folder / "requeues.jsonl").open("a") as file:
        file.write('[1]\n{"event": "st')
    assert [entry["step"] for entry in read_history(folder)] == [2]
    assert stalled(read_history(folder), "7", 2) == 1
    assert stalled(read_history(folder), "9", 2) == 0


def test_ranks_leave_their_exit_codes_where_the_script_looks(config, monkeypatch, tmp_path) -> None:
    folder, results, *words = begin([str(config), "train.epochs=3"], None, None)
    assert (Path(folder), words) == (tmp_path / "run", [str(config), "train.epochs=3"])
    monkeypatch.setenv("ADAPTIVE_RESULTS", results)
    for rank, code in ((0, 0), (1, 0), (2, 1)):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        leave_exit_code(code)
    assert sorted(path.name for path in Path(results).iterdir()) == ["rank-0", "rank-2"]
    assert end(tmp_path / "run", 1, asked=False) == ("done", 0)
    begin([str(config)], None, None)
    assert list(Path(results).iterdir()) == []


def test_a_seed_of_several_has_a_folder_and_a_file_of_its_own(config, tmp_path) -> None:
    folder, _, *words = begin([str(config), "optimizer.lr=0.3"], 5, "study")
    assert folder == str(tmp_path / "run" / "seed-5")
    tree = load_config(words[0])
    assert (tree.train.seed, tree.train.run_folder, tree.tracking.group, tree.optimizer.lr) == (5, folder, "study", 0.3)
    [word] = begin([words[0], "tracking.group=mine"], 5, "study")[2:]
    assert load_config(word).tracking.group == "mine"


def test_mistakes_are_told_in_a_line(config, monkeypatch, tmp_path) -> None:
    with pytest.raises(ConfigError, match="unknown key train\\.epoch"):
        begin([str(config), "train.epoch=3"], None, None)
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written: Not a directory; choose another folder"):
        begin([str(config), f"train.run_folder={tmp_path}/file/run"], None, None)
    monkeypatch.setenv("ADAPTIVE_MAX_STALLED", "none")
    ended = subprocess.run(
        [sys.executable, "-m", "adaptive.jobs.requeue", "begin", "--", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        "adaptive train: error: ADAPTIVE_MAX_STALLED = 'none': give a number of starts, 1 or more\n"
    )


def test_as_a_program_it_answers_words_that_bash_can_take_apart_and_imports_no_torch(config, tmp_path) -> None:
    word = "tracking.name='a\n$(b) \u00fc'"
    code = (
        f"import runpy, sys; sys.argv = ['requeue.py', 'begin', '--', {str(config)!r}, {word!r}]\n"
        f"try: runpy.run_module('adaptive.jobs.requeue', run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    results = tmp_path / "run" / ".slurm" / "7-0"
    port, *words = ended.stdout.split("\0")
    assert 20000 <= int(port) < 32000
    assert words == [str(tmp_path / "run"), str(results), str(config), word, ""]
    assert json.loads((tmp_path / "run" / "requeues.jsonl").read_text())["event"] == "start"


def fill_beside(history: Path) -> None:
    """Fill a disk, and the page that a file ends in."""
    with history.open("a") as file:
        file.write("\n" * (-history.stat().st_size % mmap.PAGESIZE))
    fill(history.parent)


@pytest.mark.parametrize("code", [70, 75, 137])
def test_a_full_disk_does_not_decide(code: int, config, monkeypatch, tmp_path, capfd) -> None:
    """The note of a job's end, the codes that its ranks leave, and the log that it prints to have no room."""
    with small_disk(tmp_path / "disk", 1) as disk:
        monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
        folder, results, *_ = begin([str(config), f"train.run_folder={disk}/run"], None, None)
        fill_beside(Path(folder) / "requeues.jsonl")
        (Path(results) / "rank-0").touch()  # as leave_exit_code does where there is no room for the number
        assert end(Path(folder), code, asked=False) == ("requeue", code)
        assert "requeues.jsonl cannot be written: No space left on device" in capfd.readouterr().err


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ESTALE])
def test_no_file_decides(number: int, config, monkeypatch, tmp_path) -> None:
    """A mock: quotas and servers that fail cannot be had here."""
    folder = Path(begin([str(config)], None, None)[0])

    def fails(self: Path, *_arguments: object, **_options: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    for name in ("open", "read_text", "glob", "is_file", "stat"):
        monkeypatch.setattr(Path, name, fails)
    assert end(folder, 75, asked=False) == ("requeue", 75)
    assert end(folder, 1, asked=False) == ("stop", 1)
    assert end(folder, 0, asked=False) == ("done", 0)


def test_starts_that_could_not_be_noted_are_counted_all_the_same(config, monkeypatch, tmp_path) -> None:
    """Else a disk that stays full would bring a job back for ever."""
    with small_disk(tmp_path / "disk", 1) as disk:
        words = [str(config), f"train.run_folder={disk}/run"]
        decisions = []
        for restart in range(4):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            if restart == 3:
                with pytest.raises(TrainingError, match="3 starts in a row"):
                    begin(words, None, None)
                break
            folder = Path(begin(words, None, None)[0])
            if not restart:
                fill_beside(folder / "requeues.jsonl")
            decisions.append(end(folder, 70, asked=False)[0])
        assert decisions == ["requeue", "requeue", "stop"]


@pytest.mark.parametrize(
    "line",
    [
        '{"job": "7", "event": "start", "step": null}',
        '{"job": "7", "event": "start", "step": "4"}',
        '{"job": "7", "event": "start", "step": [4]}',
        '{"job": "7", "event": "start", "step": 1e999}',
        '{"job": "7", "event": "start", "step": NaN, "restart": {}}',
        '{"job": "7", "event": "start", "step": true, "restart": "0"}',
        '{"job": "7", "event": "start"}',
        '{"job": "7", "event": ["start"], "decision": {}}',
        '{"job": ["7"], "event": "start", "step": 3}',
        "null",
        "7",
        '"start"',
        "[" * 100_000,
        '{"job": "7", "event": "sta',
        "\x00\x00\x00",
        "\ud800",
        "9" * 5000,
    ],
)
def test_a_history_that_is_no_history_ends_in_a_decision(line: str, config, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    history = tmp_path / "run" / "requeues.jsonl"
    history.parent.mkdir()
    history.write_bytes((line + "\n").encode("utf-8", "surrogatepass") * 2)
    folder = Path(begin([str(config)], None, None)[0])
    assert end(folder, 75, asked=False) == ("requeue", 75)
    assert [entry["event"] for entry in read_history(folder) if entry.get("decision") == "requeue"] == ["end"]


def test_a_history_that_is_a_folder_is_none(config, tmp_path) -> None:
    (tmp_path / "run" / "requeues.jsonl").mkdir(parents=True)
    folder = Path(begin([str(config)], None, None)[0])
    assert end(folder, 75, asked=False) == ("requeue", 75)


@pytest.mark.parametrize(("code", "decided"), [(0, 10), (75, 11), (1, 12)])
def test_where_the_answer_has_no_room_the_exit_code_says_it(code: int, decided: int, config, tmp_path) -> None:
    """The file that the batch script reads the decision from lies on a node's own disk, which may be full as well."""
    begin([str(config)], None, None)
    words = [sys.executable, "-m", "adaptive.jobs.requeue", "end", "--code", str(code), "--", str(tmp_path / "run")]
    with Path("/dev/full").open("wb") as nowhere:
        ended = subprocess.run(words, stdout=nowhere, stderr=nowhere, check=False)
    assert ended.returncode == decided
