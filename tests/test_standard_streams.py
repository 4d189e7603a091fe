"""Every command with a standard stream that is closed, full, or has lost its reader: no traceback, and a code that
says whether the answer arrived.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from adaptive.commands.main import COMMANDS
from adaptive.config.reference import configuration_reference
from tests.helpers.commands import ADAPTIVE, Ended, Forks
from tests.helpers.locations import REPOSITORY

Prepare = Callable[[], None]


def full(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def without_reader(*descriptors: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    for descriptor in descriptors:
        os.dup2(writer, descriptor)


def closed(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def answers(folder: Path, run: Path, config: Path) -> dict[str, list[str]]:
    """A call of each command that answers on standard output and is done in a moment."""
    return {
        "pack": ["pack", "--help"],
        "train": ["train", str(config), "--print-config"],
        "evaluate": ["evaluate", str(run), "--json", "--workers", "0"],
        "calibrate": ["calibrate", str(run), "--budget", "0.5", "--json", "--workers", "0"],
        "policy": ["policy", "--help"],
        "predict": ["predict", str(run), str(folder / "image.png"), "--json"],
        "report": ["report", str(run), "--json", "--workers", "0", "--out", str(folder / "page")],
        "dashboard": ["dashboard", "--help"],
        "export": ["export", "--help"],
        "checkpoint": ["checkpoint", str(run)],
        "submit": ["submit", str(config), "--dry-run"],
        "models": ["models", "test_resnet*"],
        "plan": ["plan", str(config), "--json"],
        "bench": ["bench", "--help"],
        "doctor": ["doctor", "--only", "python", "--json"],
        "none": ["--version"],
        "help": ["--help"],
        "wrong": ["nonsense"],
    }


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, existing_run: Path, config_file: Path) -> dict[str, list[str]]:
    from PIL import Image

    folder = tmp_path_factory.mktemp("streams")
    Image.new("RGB", (32, 32)).save(folder / "image.png")
    run = shutil.copytree(existing_run, folder / "run")  # calibrate writes into it
    return answers(folder, run, config_file)


def ended(forks: Forks, words: list[str], hurt: Callable[..., None], *descriptors: int) -> Ended:
    return forks.start(words, prepare=(hurt, descriptors)).wait()


def check(found: Ended, code: int, lines: int) -> None:
    assert found.code == code, found
    assert "Traceback" not in found.err + found.out, found
    assert "Exception ignored" not in found.err, found
    assert len(found.err.splitlines()) == lines, found


@pytest.mark.parametrize("command", ["train", "models", "checkpoint", "none", "help"])
def test_an_answer_that_is_lost_is_an_error_of_one_line(command: str, words: dict, forks: Forks) -> None:
    found = ended(forks, words[command], full, 1)
    check(found, 1, 1)
    assert "error: standard output cannot be written: No space left on device; " in found.err


@pytest.mark.parametrize("command", ["train", "models", "checkpoint", "none", "help"])
def test_a_reader_that_has_gone_is_no_word(command: str, words: dict, forks: Forks) -> None:
    check(ended(forks, words[command], without_reader, 1), 128 + signal.SIGPIPE, 0)


def test_a_closed_output_is_lost_too(words: dict, forks: Forks) -> None:
    found = ended(forks, words["models"], closed, 0, 1)
    check(found, 1, 1)
    assert "standard output cannot be written: it is closed" in found.err


@pytest.mark.parametrize("hurt", [full, without_reader, closed])
def test_without_standard_error_nothing_but_it_is_missing(hurt: Callable, words: dict, forks: Forks) -> None:
    found = ended(forks, words["none"], hurt, 2)
    assert found.code == 0
    assert found.out.startswith("adaptive-training ")
    assert ended(forks, words["wrong"], hurt, 2).code == 2
    assert ended(forks, words["none"], hurt, 1, 2).code == (141 if hurt is without_reader else 1)


@pytest.mark.parametrize("hurt", [full, pytest.param(without_reader, marks=pytest.mark.full), closed])
def test_training_goes_on_without_a_console(hurt: Callable, config_file: Path, forks: Forks, tmp_path: Path) -> None:
    words = ["train", str(config_file), f"train.run_folder={tmp_path / 'run'}"]
    found = ended(forks, words, hurt, 0, 1, 2)
    assert (found.code, found.out, found.err) == (0, "", "")
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    # A descriptor that was closed is nobody's: no file of the run got what belongs to a console.
    for file in (file for file in (tmp_path / "run").rglob("*") if file.is_file()):
        assert b"multiply-adds" not in file.read_bytes(), file


def that_does_not_wait(pipe: str) -> None:
    writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.dup2(writer, 1)


def test_a_pipe_that_does_not_wait_gets_everything(forks: Forks, tmp_path: Path) -> None:
    """Programs that share a terminal or a pipe make it so; a slow reader is then an error for who knows no better."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    command = forks.start(["train", "--help-config"], prepare=(that_does_not_wait, (str(pipe),)))
    time.sleep(1)  # it is full by now
    os.set_blocking(reader, True)
    with os.fdopen(reader, encoding="utf-8") as stream:
        assert stream.read() == configuration_reference()
    check(command.wait(), 0, 0)


@pytest.mark.full
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("hurt", "code"), [(full, 1), (without_reader, 141), (closed, 1)])
def test_every_command(hurt: Callable, code: int, command: str, words: dict, forks: Forks) -> None:
    found = ended(forks, words[command], hurt, 1)
    assert found.code == code, found
    assert "Traceback" not in found.err + found.out, found
    assert len([line for line in found.err.splitlines() if "error: standard output" in line]) == (code == 1), found
    assert ended(forks, words[command], hurt, 0, 2).code == 0


@pytest.mark.full
@pytest.mark.end_to_end
@pytest.mark.parametrize("command", ["none", "predict"])
@pytest.mark.parametrize("hurt", ["> /dev/full", "| true", ">&-", "> /dev/full 2>&1", "2>&-", "2> /dev/full", "<&-"])
def test_started_by_a_shell(hurt: str, command: str, words: dict) -> None:
    """With what Python itself does at its end, without torch and with it."""
    script = f'"$0" "$@" {hurt}; exit "${{PIPESTATUS[0]}}"'
    line = ["bash", "-c", script, ADAPTIVE, *words[command]]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    code = {"> /dev/full": 1, ">&-": 1, "> /dev/full 2>&1": 1}.get(hurt, 0)
    if hurt == "| true":
        assert found.returncode in (0, 141)  # it may be quicker than its reader's end
    else:
        assert found.returncode == code, found
    assert "Traceback" not in found.stderr
    assert "Exception ignored" not in found.stderr
    assert len([line for line in found.stderr.splitlines() if "error" in line]) == (code and hurt[-1] != "1"), found


@pytest.mark.full
@pytest.mark.end_to_end
@pytest.mark.parametrize("hurt", ["| head -1", ">&-", "> /dev/full 2>&1", "2>&-"])
def test_the_launchers_script_trains_without_a_console(hurt: str, config_file: Path, tmp_path: Path) -> None:
    script = f'"$@" {hurt}; exit "${{PIPESTATUS[0]}}"'
    words = [sys.executable, str(REPOSITORY / "launcher" / "train.py"), str(config_file)]
    line = ["bash", "-c", script, "bash", *words, f"train.run_folder={tmp_path / 'run'}"]
    found = subprocess.run(line, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found
    assert "Traceback" not in found.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
