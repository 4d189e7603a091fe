"""Checkpoints that are whole or not there: written aside, checksummed, published by one rename.

A checkpoint is a folder ``step-00001234`` of safetensors files and ``state.json``, listed with sizes and SHA-256 in
``manifest.json``, which is written last. It holds plain tensors and JSON only; nothing in it is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaptive.errors import CheckpointError, MachineError
from adaptive.files import file_sha256, sync_folder, write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint: its folder, step and phase, and its validation score (higher is better) if it has one."""

    path: Path
    step: int
    score: float | None
    phase: int = 0

    @property
    def merit(self) -> tuple[int, float, int]:
        """What the best one has most of: a later phase's network is another one, whatever the earlier one scored."""
        return self.phase, self.score or 0.0, self.step

    def state(self) -> dict[str, Any]:
        """Return the plain values saved with the tensors."""
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one file (``weights``, ``ema``, ``optimizer`` ...), on the CPU; empty without it."""
        file = self.path / f"{name}.safetensors"
        return load_file(file) if file.exists() else {}


class CheckpointStore:
    """The ``checkpoints`` folder of a run."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        score: float | None,
        phase: int = 0,
    ) -> Checkpoint:
        """Write and publish a checkpoint (rank 0 only).

        Raises:
            MachineError: no space or no right to write; what was there before is untouched.
        """
        final = self.folder / f"step-{step:08d}"
        aside = self.folder / f".writing-{step:08d}"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            for name, content in tensors.items():
                save_file(_independent(content), aside / f"{name}.safetensors")
            (aside / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            files = {p.name: _entry(p) for p in sorted(aside.iterdir())}
            manifest = {"format": FORMAT, "step": step, "phase": phase, "score": score, "files": files}
            write_atomically(aside / MANIFEST, json.dumps(manifest, indent=1))
            sync_folder(aside)
            if final.exists():  # the same step again, after a resume: the new one replaces it
                shutil.rmtree(final)
            aside.rename(final)
            sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise MachineError(
                f"checkpoint {final} cannot be written: {reason}; free space or rights are needed"
            ) from error
        return Checkpoint(final, step, score, phase)

    def all(self) -> list[Checkpoint]:
        """Return the published checkpoints, oldest first, damaged ones included."""
        found = []
        for path in sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []:
            manifest = _read_manifest(path) or {}
            number = path.name.removeprefix("step-")
            if number.isdigit():
                found.append(Checkpoint(path, int(number), manifest.get("score"), manifest.get("phase", 0)))
        return found

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that passes its checksums, and why newer ones were passed over."""
        passed_over: list[str] = []
        for checkpoint in reversed(self.all()):
            fault = verify(checkpoint.path)
            if fault is None:
                return checkpoint, passed_over
            passed_over.append(f"{checkpoint.path.name}: {fault}")
        return None, passed_over

    def best(self) -> Checkpoint | None:
        """Return the valid checkpoint of most merit (latest phase, highest score, newest); None without any score."""
        scored = [c for c in self.all() if c.score is not None]
        for checkpoint in sorted(scored, key=lambda c: c.merit, reverse=True):
            if verify(checkpoint.path) is None:
                return checkpoint
        return None

    def prune(self, keep: int) -> None:
        """Remove all but the newest ``keep`` and the best; leftovers of interrupted writing go too."""
        everything = self.all()
        scored = [c for c in everything if c.score is not None]
        kept = {c.path for c in everything[-keep:]}
        if scored:
            kept.add(max(scored, key=lambda c: c.merit).path)
        for checkpoint in everything:
            if checkpoint.path not in kept:
                # Renamed first, so that a kill in the middle leaves no folder that looks like a checkpoint.
                doomed = checkpoint.path.with_name(f".removing-{checkpoint.path.name}")
                checkpoint.path.rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        for leftover in [*self.folder.glob(".writing-*"), *self.folder.glob(".removing-*")]:
            shutil.rmtree(leftover, ignore_errors=True)


def verify(path: Path) -> str | None:
    """Check a checkpoint's files against its manifest; return what is wrong, or None."""
    manifest = _read_manifest(path)
    if manifest is None:
        return "no readable manifest.json (writing was interrupted)"
    if manifest.get("format") != FORMAT:
        return f"format {manifest.get('format')!r}, this version reads {FORMAT}"
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes, expected {entry['bytes']}"
        if file_sha256(file) != entry["sha256"]:
            return f"{name} does not match its checksum"
    return None


def newest_or_refuse(store: CheckpointStore) -> Checkpoint:
    """Return the newest valid checkpoint, or raise CheckpointError saying what was found instead."""
    checkpoint, passed_over = store.newest_valid()
    if checkpoint is None:
        detail = f": {'; '.join(passed_over)}" if passed_over else ""
        raise CheckpointError(f"{store.folder} holds no valid checkpoint{detail}")
    return checkpoint


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _independent(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory or are not contiguous."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in content.items()}
