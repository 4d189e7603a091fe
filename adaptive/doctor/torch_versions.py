"""Pairs of torch and torchvision: those that the tests have passed with, and builds that are known not to fit.

setup.py's bounds, the table in docs/dependencies.md, `adaptive doctor` and ``make test-versions`` follow this list; pip
enforces little of it, since torchvision 0.29 asks for any torch from 2.14 on.
"""

from __future__ import annotations

from typing import NamedTuple

from packaging.version import Version


class TriedPair(NamedTuple):
    """Releases of torch and torchvision with which the tests of ``make test-versions`` pass, on a Python."""

    torch: str
    torchvision: str
    python: str


# From the oldest to the newest: each torch release line with its last release at the time.
TRIED = (
    TriedPair("2.11.0", "0.26.0", "3.12"),
    TriedPair("2.12.1", "0.27.1", "3.12"),
    TriedPair("2.13.0", "0.28.0", "3.11"),
    TriedPair("2.14.1", "0.29.1", "3.13"),
    TriedPair("2.15.0", "0.29.2", "3.11"),
    TriedPair("2.15.0", "0.29.2", "3.13"),
)
PYTHONS = ("3.11", "3.12", "3.13")
NEWEST = TRIED[-1]


def install_command(torch: str = NEWEST.torch) -> str:
    """Return the pip command that installs the tried pair of a torch release's line, or the newest.

    Its ``===`` (PEP 440) takes no local version: ``==`` prefers 2.13.0+cpu where a folder of wheels holds that build.
    """
    pair = next((pair for pair in TRIED if _line(pair.torch) == _line(torch)), NEWEST)
    return f"pip install --force-reinstall torch==={pair.torch} torchvision==={pair.torchvision}"


def known_fault(torch: str, torchvision: str) -> str | None:
    """Return why an installed pair is known not to work, or None; versions as the packages give them, 2.13.0+cpu."""
    if Version(torch).local == "cpu" and Version(torchvision).local != "cpu":
        return (
            f"torch {torch} is a CPU build, torchvision {torchvision} is not: its compiled operators are not found "
            "('operator torchvision::nms does not exist')"
        )
    return None


def tried(torch: str, torchvision: str) -> bool:
    """Whether the tests have passed with these release lines (the first two numbers) of both."""
    lines = (_line(torch), _line(torchvision))
    return any(lines == (_line(pair.torch), _line(pair.torchvision)) for pair in TRIED)


def _line(version: str) -> tuple[int, ...]:
    return Version(version).release[:2]
