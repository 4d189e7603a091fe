"""The provenance of a run's start: its code, launcher, Slurm job and machine, for W&B and ``environment.jsonl``."""

from __future__ import annotations

import json
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaptive.distributed.ranks import Ranks
from adaptive.files import code_root
from adaptive.jobs.code_version import code_version

# The variables of Slurm that tell one start from another.
JOB = {
    "id": "SLURM_JOB_ID",
    "name": "SLURM_JOB_NAME",
    "partition": "SLURM_JOB_PARTITION",
    "nodes": "SLURM_JOB_NODELIST",
    "restart": "SLURM_RESTART_COUNT",
    "array": "SLURM_ARRAY_JOB_ID",
    "task": "SLURM_ARRAY_TASK_ID",
}


def origin(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Return what W&B and ``environment.jsonl`` show of this start.

    The code is what ``adaptive submit`` froze (code_version.json in the run folder), if that is what runs; else the
    checkout's.
    """
    found: dict[str, Any] = {
        "start": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": _frozen(folder) or code_version(),
        "launcher": ranks.launcher,
        "host": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
    }
    job = {name: os.environ[variable] for name, variable in JOB.items() if os.environ.get(variable)}
    if "id" in job:
        found["slurm"] = job
    return found


def _frozen(folder: Path) -> dict[str, Any] | None:
    if code_root() != (folder / "submitted" / "code").resolve():
        return None
    with suppress(OSError, ValueError):
        return json.loads((folder / "code_version.json").read_text(encoding="utf-8"))
    return None
