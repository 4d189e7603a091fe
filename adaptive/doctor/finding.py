"""The doctor's checks and findings as classes: a check runs within a time limit, and its failure is a finding too."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from adaptive.errors import AdaptiveError, reason_of
from adaptive.foreign_text import shown

Status = Literal["ok", "warning", "error", "skipped"]


@dataclass(frozen=True)
class Finding:
    """The result of a check: ok, or what is wrong and how to mend it.

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
class CheckSettings:
    """What the checks are told about the training that is planned.

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
    """A named check and the group of checks that it is asked for with.

    Attributes:
        slow: takes more than a second; left out by ``--quick``.
        limit: seconds after which it counts as hanging.
    """

    name: str
    group: str
    run: Callable[[CheckSettings], Finding]
    slow: bool = False
    limit: float = 20.0


def ok(found: str) -> Finding:
    """Return the finding that all is well."""
    return Finding("", "ok", found)


def warning(found: str, remedy: str) -> Finding:
    """Return the finding that training works, but may suffer."""
    return Finding("", "warning", found, remedy)


def error(found: str, remedy: str) -> Finding:
    """Return the finding that training fails."""
    return Finding("", "error", found, remedy)


def skipped(found: str) -> Finding:
    """Return the finding that there is nothing to check here."""
    return Finding("", "skipped", found)


def run_check(check: Check, settings: CheckSettings) -> Finding:
    """Run one check; an exception, or a time limit that is exceeded, becomes a finding."""
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
    return replace(finding, name=check.name, found=shown(finding.found), remedy=shown(finding.remedy))


def _guarded(check: Check, settings: CheckSettings) -> Finding:
    try:
        return check.run(settings)
    except AdaptiveError as raised:  # its message ends with the remedy
        found, _, remedy = str(raised).rpartition("; ")
        return error(found or remedy, remedy)
    except Exception as raised:
        reason = f"{type(raised).__name__}: {reason_of(raised, 200)}"
        return error(f"could not be checked: {reason}", f"adaptive doctor --only {check.name}")
