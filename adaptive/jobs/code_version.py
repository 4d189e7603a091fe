"""Which code a run is started with: its commit and what differs from it, and the frozen copy that a job runs."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adaptive.errors import MachineError
from adaptive.files import code_root, file_sha256, installed_version, write_atomically
from adaptive.foreign_text import redacted

PARTS = ("adaptive", "launcher", "slurm", "configs")
LISTING = "frozen.json"  # in a frozen copy: its files and their checksums
LOOKING = 20.0  # seconds that git may take


def batch_scripts() -> Path:
    """Return the folder of the batch scripts: the checkout's, or what a wheel brought.

    Raises:
        MachineError: there is none.
    """
    folders = (code_root() / "slurm", code_root() / "adaptive" / "slurm")
    for folder in folders:
        if (folder / "lib.sh").is_file():
            return folder
    raise MachineError(
        f"the batch scripts are missing: neither {folders[0]} nor {folders[1]} holds lib.sh; "
        "install Adaptive anew, from a checkout or a wheel"
    )


def copy_code(folder: Path) -> None:
    """Copy the package and the batch scripts to a folder that does not exist, and list what is in it."""
    left_out = shutil.ignore_patterns("__pycache__", "*.pyc", "slurm")
    shutil.copytree(code_root() / "adaptive", folder / "adaptive", ignore=left_out)
    shutil.copytree(batch_scripts(), folder / "slurm")
    list_code(folder)


def list_code(folder: Path) -> None:
    """Write the checksums of a frozen copy's files into it, by which a job knows that it is whole."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LISTING)
    sums = {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}
    write_atomically(folder / LISTING, json.dumps(sums, indent=1))


def check_frozen_code() -> None:
    """Refuse to run, in a Slurm job, another copy of the code than its batch script names, or a part of it.

    One task of a node compares a frozen copy with its listing.

    Raises:
        MachineError: ADAPTIVE_HOME is another folder than the one that this module was imported from, or a frozen copy
            that lacks files or was changed.
    """
    home = os.environ.get("ADAPTIVE_HOME")
    if not home or "SLURM_JOB_ID" not in os.environ:
        return
    remedy = "leave ADAPTIVE_HOME first on PYTHONPATH (python -P, not -I or -E), or unset it outside of batch scripts"
    try:
        if Path(home).samefile(code_root()):
            if os.environ.get("SLURM_LOCALID", "0") == "0":
                _check_whole(Path(home))
            return
    except OSError as error:
        remedy = f"it cannot be read here: {error.strerror}; mount it, in a container too"
    raise MachineError(f"ADAPTIVE_HOME = {home!r} is this job's code, but {str(code_root())!r} runs; {remedy}")


def _check_whole(home: Path) -> None:
    """Compare a frozen copy with its listing; a checkout has none (raises MachineError)."""
    try:
        listed = dict(json.loads((home / LISTING).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError):
        raise MachineError(f"{home / LISTING} cannot be read; submit again") from None
    for name, digest in listed.items():
        try:
            found = file_sha256(home / name)
        except OSError:
            raise MachineError(f"ADAPTIVE_HOME = {str(home)!r}: {name} is missing; submit again") from None
        if found != digest:
            raise MachineError(f"ADAPTIVE_HOME = {str(home)!r}: {name} is not what was frozen; submit again")


def code_version() -> dict[str, Any]:
    """Return commit and branch of the checkout, what differs from the commit, and the installed version."""
    commit = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=normal", "--", *PARTS) if commit else ""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": installed_version("adaptive-training"),
        "commit": commit or None,
        "branch": _git("rev-parse", "--abbrev-ref", "HEAD") or None,
        "dirty": bool(status) if commit else None,
        "changed": status.splitlines(),
        "python": platform.python_version(),
        "root": str(code_root()),
    }


def write_code_version(folder: Path) -> dict[str, Any]:
    """Write code_version.json to a folder, and code.diff where the checkout differs from its commit."""
    about = code_version()
    difference = folder / "code.diff"
    difference.unlink(missing_ok=True)
    if about["dirty"]:
        text = _git("diff", "HEAD", "--", *PARTS) + "\n"
        # A configuration may name a store with its password; struck out, the diff would be no patch any more.
        write_atomically(difference, text, private=redacted(text) != text)
    write_atomically(folder / "code_version.json", json.dumps(about, indent=1))
    return about


def _git(*words: str) -> str:
    """Return what git says of the checkout; nothing where there is no checkout, or no git."""
    root = code_root()
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LOOKING,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.rstrip("\n") if done.returncode == 0 else ""
