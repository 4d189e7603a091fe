import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive.commands.main import COMMANDS, main
from tests.helpers.commands import Forks, start_command

# One interpreter for all, which has imported nothing of ours before it forks.
EACH_IN_A_FORK = """
import contextlib, io, json, os, sys
for words in json.load(sys.stdin):
    if os.fork() == 0:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            from adaptive.commands.main import main
            main(words)
        print(json.dumps([shown.getvalue(), list(sys.modules)]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_alone_it_shows_its_commands(forks: Forks) -> None:
    for words in ([], ["--help"]):
        ended = forks.run(words)
        assert (ended.code, ended.err) == (0, "")
        for name, summary in COMMANDS.items():
            assert name in ended.out
            assert summary in ended.out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, forks: Forks) -> None:
    ended = forks.run([name, "--help"])
    assert (ended.code, ended.err) == (0, "")
    assert f"usage: adaptive {name}" in ended.out


def test_version_names_the_libraries(forks: Forks) -> None:
    ended = forks.run(["--version"])
    assert (ended.code, ended.err) == (0, "")
    names = [line.split()[0] for line in ended.out.splitlines()]
    assert names == ["adaptive-training", "torch", "deepspeed", "timm", "webdataset", "wandb"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nonsense"], ["adaptive: error: ", "'nonsense'", "commands: pack, train, evaluate, calibrate"]),
        (["evalute", "run"], ["adaptive: error: ", "'evalute'", "did you mean evaluate"]),
        (["--nonsense"], ["adaptive: error: ", "--nonsense", "adaptive --help"]),
        (["evaluate"], ["adaptive evaluate: error: ", "RUN", "adaptive evaluate --help"]),
        (["evaluate", "run", "--batch", "x"], ["adaptive evaluate: error: ", "--batch", "'x'"]),
        (["evaluate", "run", "--weights", "x"], ["adaptive evaluate: error: ", "--weights", "'x'", "plain"]),
        (["calibrate", "run"], ["adaptive calibrate: error: ", "--budget", "--max-loss", "is required"]),
        (["calibrate", "run", "--budget", "1", "--max-loss", "1"], ["adaptive calibrate: error: ", "not allowed with"]),
        (["predict", "run"], ["adaptive predict: error: ", "IMAGE", "adaptive predict --help"]),
        (["bench", "nothing", "run"], ["adaptive bench: error: ", "'nothing'", "inference"]),
        (["export", "run"], ["adaptive export: error: ", "DEST", "adaptive export --help"]),
        (["pack", "source"], ["adaptive pack: error: ", "DEST", "adaptive pack --help"]),
        (["train", "run.yaml", "--nonsense"], ["error: ", "--nonsense", "--help"]),
    ],
)
def test_wrong_words_are_one_line(words: list[str], parts: list[str], forks: Forks) -> None:
    ended = forks.run(words)
    assert ended.code == 2
    assert ended.out == ""
    assert len(ended.err.splitlines()) == 1
    for part in parts:
        assert part in ended.err


def test_options_may_stand_anywhere(config_file: Path, forks: Forks) -> None:
    spellings = [
        ["train", str(config_file), "--print-config", "train.epochs=7"],
        ["train", "--print-config", str(config_file), "train.epochs=7"],
        ["train", str(config_file), "train.epochs=7", "--print-config"],
    ]
    for words in spellings:
        ended = forks.run(words)
        assert (ended.code, ended.err) == (0, "")
        assert "  epochs: 7\n" in ended.out


@pytest.mark.end_to_end
def test_help_imports_nothing_heavy() -> None:
    words = [["--help"], [], *([name, "--help"] for name in COMMANDS)]
    ended = subprocess.run(
        [sys.executable, "-c", EACH_IN_A_FORK], input=json.dumps(words), capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(found) == len(words)
    for shown, loaded in found:
        assert "usage: adaptive" in shown
        assert not set(loaded) & {"torch", "timm", "deepspeed", "webdataset", "wandb", "numpy"}


@pytest.mark.end_to_end
def test_the_installed_command_starts() -> None:
    ended = start_command(["--version"])
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("adaptive-training ")
    assert start_command(["nonsense"]).code == 2


@pytest.mark.parametrize(
    "words", [["evaluate", "LONG"], ["report", "LONG"], ["plan", "LONG"], ["pack", "--verify", "LONG"]]
)
def test_a_name_that_is_too_long_is_one_short_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["x" * 5000 if word == "LONG" else word for word in words])
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith(f"adaptive {words[0]}: error: x")
    assert line.endswith("File name too long; check the path")
    assert len(line) < 250
