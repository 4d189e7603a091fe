"""Every benchmark is a script that says what it takes, and takes the command that its results were made with."""

import importlib
import os
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.locations import REPOSITORY

SCRIPTS = sorted(path for path in REPOSITORY.glob("benchmarks/*.py") if path.stem != "__init__")

PAGES = sorted(path for path in REPOSITORY.glob("benchmarks/results/*.md") if not path.stem.endswith("_reading"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_script_answers_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code in (0, None)
    usage = capsys.readouterr().out.splitlines()[0]
    assert usage.startswith("usage: ")
    assert script.stem in usage
    assert sys.path[0] == str(REPOSITORY)  # where it finds the checkout's packages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_result_names_a_command_that_its_script_takes(page: Path) -> None:
    command = re.search(r"^`python benchmarks/(\w+)\.py(.*)`$", page.read_text(), re.MULTILINE)
    assert command
    module = importlib.import_module(f"benchmarks.{command[1]}")
    words = shlex.split(command[2])
    assert module.parser().parse_args(words) if hasattr(module, "parser") else module.parse(words)
