"""The commands that users are told to type: in code blocks, in comments, in tables and in running text."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.docs.pages import PAGES
from tests.helpers.locations import REPOSITORY

# benchmarks/results has a test of its own (tests/benchmarks/test_scripts.py).
DOCUMENTS = [*PAGES, *(REPOSITORY / folder / "README.md" for folder in ("configs", "benchmarks"))]
COMMENTED = sorted([*REPOSITORY.glob("slurm/*.sbatch"), *REPOSITORY.glob("configs/**/*.yaml")])
SHELL = {"", "bash", "sh", "shell", "console"}
PROGRAMS = (
    *("adaptive", "python", "python3", "torchrun", "deepspeed", "sbatch", "srun", "mpirun", "make", "pip", "wandb"),
    *("scancel", "scontrol"),
)
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
# What stands for a user's own words, and what it is taken for here.
WORDS = {"CONFIG": "configs/quickstart.yaml", "...": "configs/quickstart.yaml", "RUN...": "RUN", "SWEEP": "E/P/S"}


@dataclass(frozen=True)
class Command:
    """A command as it is written; ``whole`` where it can be typed so, else a mention that may leave words out."""

    page: str
    text: str
    whole: bool = True

    @property
    def words(self) -> list[str]:
        """Its words with placeholders replaced, without optional words and without variables in front."""
        text = re.sub(r" \[(?:key=value|options|--nodes) ?[^\]]*\]", "", self.text)
        words = [WORDS.get(word, word) for word in shlex.split(re.sub(r"\[(--[^\]]*)\]", r"\1", text), comments=True)]
        while re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        return words

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"


def typed() -> list[Command]:
    """Every command that a page, a script or a configuration shows on a line of its own."""
    found = []
    for page in DOCUMENTS:
        for language, block in FENCED.findall(page.read_text()):
            if language in SHELL:
                found += [Command(_name(page), line) for line in _lines(block)]
    for file in COMMENTED:
        text = file.read_text()
        lines = re.findall(r"^#   (\S.*)$", text, re.MULTILINE) + re.findall(r'echo "usage: ([^"]*)"', text)
        lines = [re.sub(r"\s{2,}\(.*$", "", line) for line in lines]
        found += [Command(_name(file), line) for line in lines if line.split()[0] in PROGRAMS]
    told = re.findall(r'@echo "  (adaptive .*?)(?: {2,}.*)?"', (REPOSITORY / "Makefile").read_text())
    return found + [Command("Makefile", line.replace("$(RUN)", "runs/quickstart")) for line in told]


def mentioned() -> list[Command]:
    """Every command in running text and in tables, in code spans."""
    found = []
    for page in DOCUMENTS:
        for span in SPAN.findall(FENCED.sub("", page.read_text())):
            for text in re.split(r" && ", " ".join(span.split())):
                first, *more = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", text).split(" ")
                program = first.removeprefix(".venv/bin/")
                if program in PROGRAMS and more and program == first:
                    found.append(Command(_name(page), text, whole=False))
    return found


def _lines(block: str) -> list[str]:
    """The commands of a block of shell: its lines, those behind a prompt where there is one, or a script as a whole."""
    if re.search(r"^\s*for ", block, re.MULTILINE):
        return [block]
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    shown = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return shown or lines


def _name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()
