"""A finding, a check, and how checks are run: each within a time limit, none able to end the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from adaptive.errors import AdaptiveError, one_line, reason_of

Status = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        name: of the check.
        status: ``error`` is what training fails of, ``warning`` what it may suffer from.
        found: one line.
        remedy: a command to type, or what to do; there is one for everything that is not well.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Settings:
    """What the checks are told.

    Attributes:
        run_folder: where runs are to be written.
        data: packed dataset, a folder or URL, if one was named.
        environment: as the launcher made it, before it was completed for the process group.
        local_ranks: processes that train on this machine.
        nodes: machines that train together.
    """

    run_folder: Path = Path("runs")
    data: str | None = None
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    local_ranks: int = 1
    nodes: int = 1


@dataclass(frozen=True)
class Check:
    """A named check, in a group of them that may be asked for together.

    Attributes:
        slow: takes more than a second; left out by ``--quick``.
        limit: seconds after which it counts as hanging.
    """

    name: str
    group: str
    run: Callable[[Settings], Finding]
    slow: bool = False
    limit: float = 20.0


def ok(found: str) -> Finding:
    """All is well."""
    return Finding("", "ok", found)


def warning(found: str, remedy: str) -> Finding:
    """Training works, but may suffer."""
    return Finding("", "warning", found, remedy)


def error(found: str, remedy: str) -> Finding:
    """Training fails."""
    return Finding("", "error", found, remedy)


def skipped(found: str) -> Finding:
    """There is nothing to look at here."""
    return Finding("", "skipped", found)


def run_check(check: Check, settings: Settings) -> Finding:
    """Run one check; its exceptions and a time limit that is over become findings."""
    results: list[Finding] = []
    thread = threading.Thread(target=lambda: results.append(_guarded(check, settings)), daemon=True, name=check.name)
    thread.start()
    try:
        thread.join(check.limit)
    except KeyboardInterrupt:
        thread.join(5.0)  # to remove what it has written
        raise
    again = f"adaptive doctor --only {check.name}"
    if not results:
        found = f"no answer within {check.limit:g} s: the file system, network or driver behind it hangs"
        results.append(error(found, f"once more, with nothing else running: {again}"))
    finding = results[0]
    return replace(finding, name=check.name, found=one_line(finding.found), remedy=one_line(finding.remedy))


def _guarded(check: Check, settings: Settings) -> Finding:
    try:
        return check.run(settings)
    except AdaptiveError as raised:  # its message ends with the remedy
        found, _, remedy = str(raised).rpartition("; ")
        return error(found or remedy, remedy)
    except Exception as raised:
        reason = f"{type(raised).__name__}: {reason_of(raised, 200)}"
        return error(f"could not be checked: {reason}", f"adaptive doctor --only {check.name}")
