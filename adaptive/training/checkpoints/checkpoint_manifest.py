"""A checkpoint's manifest: its files with sizes and checksums, and the check that they are there. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from adaptive.errors import refusal
from adaptive.files import file_sha256
from adaptive.passing_faults import patiently

FORMAT = 1
FEW_SECONDS = 5.0  # for one of many manifests that a file server does not give at once
MANIFEST = "manifest.json"
STATE = "state.json"
PUBLISHED, WRITING, REPLACED, REMOVING = "step-", ".writing-", ".replaced-", ".removing-"


class _File(BaseModel):
    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class _Manifest(BaseModel):
    """What manifest.json says; names are of files in the folder itself, and its state is always among them."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: int
    step: int
    phase: int = 0
    epoch: int | None = None
    score: float | None = None
    files: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], _File]

    @field_validator("files")
    @classmethod
    def _holds_the_state(cls, files: dict[str, _File]) -> dict[str, _File]:
        if STATE not in files or ".." in files:
            raise ValueError(f"{STATE} is not listed")
        return files


def verify(path: Path, quick: bool = False) -> str | None:
    """Check a checkpoint's files against its manifest; return what is wrong, or None. ``quick`` compares sizes only."""
    try:
        return examine(path, quick)
    except OSError as error:
        return f"it cannot be read: {refusal(error) or error.strerror}"


def examine(path: Path, quick: bool = False) -> str | None:
    """Check a checkpoint as `verify` does.

    Raises:
        OSError: this user may not read it, or the file system fails, which was tried for a while: neither says
            anything of the checkpoint.
    """
    return patiently(lambda: _examine(path, quick), path)


def _examine(path: Path, quick: bool) -> str | None:
    try:
        manifest = _parsed(path)
    except (FileNotFoundError, NotADirectoryError):
        manifest = None
    if manifest is None:
        return "no readable manifest.json (writing was interrupted)"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')!r}, this version reads {FORMAT}"
    for name, entry in manifest["files"].items():
        file = path / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes, expected {entry['bytes']}"
            if not quick and file_sha256(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
        except (FileNotFoundError, NotADirectoryError):  # a run that goes on has removed it just now
            return f"{name} is missing"
    return None


def newest_step(folder: Path) -> int:
    """Return the step of the newest checkpoint in a ``checkpoints`` folder whose files have their sizes; 0 for none."""
    found = {}
    for path in folder.glob("*step-*"):
        found[path.name.removeprefix(REPLACED).removeprefix(PUBLISHED)] = path
    steps = sorted(((int(name), path) for name, path in found.items() if name.isdigit()), reverse=True)
    return next((step for step, path in steps if verify(path, quick=True) is None), 0)


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint's list of files and what it says about itself, or None where it cannot be read."""
    try:
        return patiently(lambda: _parsed(path), path, FEW_SECONDS)
    except OSError:
        return None


def _parsed(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and manifest.get("format") != FORMAT:
            return {"format": manifest.get("format"), "files": {}}
        return _Manifest.model_validate(manifest, strict=True).model_dump()
    except (ValueError, RecursionError):  # pydantic's errors are ValueErrors
        return None
