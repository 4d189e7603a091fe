"""The plugin on small folders of tests, called as the Makefile calls it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.locations import REPOSITORY
from tests.helpers.waiting import PATIENCE, wait_until

Call = Callable[..., "subprocess.CompletedProcess[str]"]

HEAD = """
import os, pathlib, signal, time
import pytest

def flaky():
    tried = pathlib.Path(os.environ["FLAKY"])
    assert tried.exists() or tried.touch(), "the first time"
"""
FLAKY = "@pytest.mark.ranks\ndef test_flaky(): flaky()\n"
BROKEN = "@pytest.mark.chaos\ndef test_broken(): assert False\n"
PLAIN = "def test_plain(): assert False\n"
GOOD = "def test_good(): pathlib.Path(os.environ['COUNT']).open('a').write('x')\n"
SECOND = "once more, alone"


def command(folder: Path, tests: str, *words: str) -> tuple[list[str], dict[str, str]]:
    (folder / "test_it.py").write_text(HEAD + tests)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = ranks\n  chaos\naddopts = --strict-markers\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"FLAKY": str(folder / "tried"), "COUNT": str(folder / "count"), "PYTHONPATH": str(REPOSITORY)}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # most take time to import, and have no part in this
    return [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "tests.helpers.second_try", *words], environment


@pytest.fixture
def call(tmp_path: Path) -> Call:
    def call(tests: str, *words: str) -> "subprocess.CompletedProcess[str]":
        line, environment = command(tmp_path, tests, *words)
        return subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    return call


@pytest.mark.parametrize("words", [(), ("-n", "2", "--dist", "loadfile")], ids=["alone", "two workers"])
def test_what_waits_passes_at_the_second_try_and_is_named(call: Call, tmp_path: Path, words: tuple[str, ...]) -> None:
    ended = call(GOOD + FLAKY, *words)
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.splitlines()[-1] == "Passed at the second try alone, to be mended: test_it.py::test_flaky"
    assert (tmp_path / "count").read_text() == "x", "nothing else is repeated"


def test_a_fixture_that_fails_is_its_tests_failure(call: Call) -> None:
    ended = call("@pytest.fixture\ndef late(): flaky()\n@pytest.mark.ranks\ndef test_late(late): pass\n")
    assert ended.returncode == 0, ended.stdout
    assert ended.stdout.splitlines()[-1].endswith("to be mended: test_it.py::test_late")


@pytest.mark.parametrize("tests", [PLAIN, FLAKY + PLAIN], ids=["plain", "mixed"])
def test_a_plain_failure_fails_and_nothing_is_repeated(call: Call, tests: str) -> None:
    ended = call(tests)
    assert ended.returncode == 1
    assert SECOND not in ended.stdout


def test_what_fails_twice_fails(call: Call) -> None:
    ended = call(FLAKY + BROKEN)
    assert ended.returncode == 1
    assert SECOND in ended.stdout
    first, second = ended.stdout.splitlines()[-2:]
    assert first == "Failed twice: test_it.py::test_broken"
    assert second.endswith("to be mended: test_it.py::test_flaky")


def test_what_is_skipped_at_the_second_try_has_not_passed(call: Call) -> None:
    ended = call(
        "@pytest.mark.ranks\n"
        "def test_skipped():\n    if pathlib.Path(os.environ['FLAKY']).exists(): pytest.skip()\n    flaky()\n"
    )
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1] == "1 tests had failed, and 0 passed at the second try"


def test_without_a_failure_there_is_no_second_call(call: Call) -> None:
    ended = call(GOOD)
    assert ended.returncode == 0
    assert SECOND not in ended.stdout


@pytest.mark.parametrize(
    ("tests", "words", "code"),
    [
        (FLAKY + "import nothing_of_this_name\n", (), 2),
        (FLAKY, ("--no-such-option",), 4),
        (FLAKY, ("-k", "nothing"), 5),
        (FLAKY + GOOD, ("--exitfirst",), 1),  # the other test was not run
    ],
    ids=["not collected", "wrong usage", "no tests", "stopped"],
)
def test_a_call_that_did_not_run_its_tests_is_not_repeated(
    call: Call, tests: str, words: tuple[str, ...], code: int
) -> None:
    ended = call(tests, *words)
    assert ended.returncode == code, ended.stdout + ended.stderr
    assert SECOND not in ended.stdout


def test_an_interrupted_call_is_not_repeated(tmp_path: Path) -> None:
    line, environment = command(tmp_path, FLAKY + "def test_z(): pathlib.Path('ready').touch(); time.sleep(600)\n")

    def listen() -> None:  # what a shell runs in the background is started with SIGINT ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=listen
    )
    wait_until(lambda: (tmp_path / "ready").exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert SECOND not in out
