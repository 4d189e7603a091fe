"""The tutorial, as typed: its files are saved, its commands run in an empty folder, and what they print is compared."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import blocks, lines, outputs
from tests.helpers.commands import RANK_VARIABLES
from tests.helpers.locations import REPOSITORY

# A minute of one core, for commands that other tests call one by one; a busy machine has less.
pytestmark = [pytest.mark.end_to_end, pytest.mark.full, pytest.mark.timeout(1800)]

FILE = re.compile(r"# (\w+\.\w+)\n")
NUMBER = re.compile(r"\b[0-9a-f]{12}\b|\d[\d,.:]*|nobody|everybody")  # measured here; a threshold may be a word


def shape(text: str) -> list[str]:
    """What of a program's output is the same on every machine: the words, and where there are numbers."""
    return [re.sub(r"\W+", " ", NUMBER.sub("N", line)).strip() for line in lines(text)]


def test_the_tutorial_works_as_typed(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    for name in RANK_VARIABLES:
        environment.pop(name, None)
    called = []
    for block, shown in outputs(blocks("tutorial.md")):
        if named := FILE.match(block.text):
            (tmp_path / named[1]).write_text(block.text)
            continue
        assert block.language == "bash"
        ended = subprocess.run(
            ["bash", "-euc", block.text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        assert ended.returncode == 0, block.text + ended.stdout + ended.stderr
        printed = iter(shape(ended.stdout))
        missing = [line for line in shape("\n".join(shown)) if line not in printed]  # in this order
        assert missing == [], f"{block.text}prints:\n{ended.stdout}"
        called += [line.split()[1] for line in block.text.splitlines() if line.startswith("adaptive ")]
    assert called == ["pack", "train", "evaluate", "calibrate", "predict", "report", "export", "predict"]
