"""What the benchmarks' pages and command lines have in common."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from adaptive.errors import ConfigError
from benchmarks.shared.locations import RESULTS

NOT_REPEATED = ("json", "output")


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_HasName)


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add ``--output``, the folder of the result files."""
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result files (benchmarks/results)")


def command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the command line that repeats this run, without its paths: they are of one machine."""
    words = ["python", f"benchmarks/{parser.prog}.py"]
    defaults = vars(parser.parse_args([]))
    for name, value in vars(options).items():
        if name in NOT_REPEATED or value == defaults[name]:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if isinstance(value, Path):
            words.append(name.upper())
        elif isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)


def only(given: Sequence[str] | None, items: Sequence[Named], kind: str) -> list[Named]:
    """Return the items that ``--only`` names, in their own order, or all without it (raises ConfigError)."""
    names = [item.name for item in items]
    for name in given or ():
        if name not in names:
            raise ConfigError(f"--only {name}: no such {kind}; take some of {', '.join(names)}")
    return [item for item in items if item.name in (given or names)]


def hardware(machine: Mapping[str, Any]) -> str:
    """Return `benchmarks.shared.results.machine` in words."""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "timm", "deepspeed"))
    place = f"{machine['gpu'] or machine['cpu']}, {os.cpu_count()} cores, {machine['threads']} threads"
    return f"{place}; {versions}, Python {machine['python']}"


def spread(value: Mapping[str, float] | None, digits: int) -> str:
    """Return a median with its quartiles, or nothing."""
    if value is None:
        return ""
    return f"{value['median']:.{digits}f} ({value['q1']:.{digits}f} - {value['q3']:.{digits}f})"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write(folder: Path, stem: str, result: Mapping[str, Any], page: str) -> list[Path]:
    """Write ``stem``.json and ``stem``.md, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {folder / f"{stem}.md": page, folder / f"{stem}.json": json.dumps(result, indent=2) + "\n"}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return list(texts)
