"""Checkpoints on disk, whole or not there at all: written aside, checksummed, published by one rename.

A checkpoint is a folder ``step-00001234`` of safetensors files and ``state.json``, listed with sizes and SHA-256 in
``manifest.json``, which is written last. It holds plain tensors and JSON only; nothing in it is ever unpickled.
Names with a dot in front are not published: being written, removed, or replaced by the same step saved anew.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from adaptive.errors import CheckpointError, MachineError, PassingError, reason_of, refusal, told_refusals
from adaptive.files import file_sha256, let_umask_count, sync_folder, write_atomically
from adaptive.passing_faults import passing
from adaptive.training.checkpoints.checkpoint_manifest import FORMAT as FORMAT
from adaptive.training.checkpoints.checkpoint_manifest import MANIFEST as MANIFEST
from adaptive.training.checkpoints.checkpoint_manifest import PUBLISHED, REMOVING, REPLACED, STATE, WRITING
from adaptive.training.checkpoints.checkpoint_manifest import examine as examine
from adaptive.training.checkpoints.checkpoint_manifest import read_manifest as read_manifest
from adaptive.training.checkpoints.checkpoint_manifest import verify as verify


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        path: its folder.
        step: number of steps done.
        score: of the validation at this step, higher is better; None where there was none.
        phase: from 0.
        epoch: that the last step belonged to, from 1; None in checkpoints of earlier versions.
    """

    path: Path
    step: int
    score: float | None
    phase: int = 0
    epoch: int | None = None

    @property
    def merit(self) -> tuple[int, float, int]:
        """Sort key of the best checkpoint: a later phase's network is another one, whatever the earlier one scored."""
        return self.phase, self.score or 0.0, self.step

    def state(self) -> dict[str, Any]:
        """Return the plain values saved with the tensors (raises CheckpointError where they are none)."""
        try:
            found = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise CheckpointError(f"{self.path / STATE} is no JSON object; give an intact copy of the run")
        return found

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one file (``weights``, ``ema``, ``optimizer`` ...), on the CPU; empty without it.

        Raises:
            CheckpointError: the file holds no tensors.
        """
        file = self.path / f"{name}.safetensors"
        try:
            return _load(file) if file.exists() else {}
        except SafetensorError as error:
            reason = reason_of(error)
            raise CheckpointError(f"{file} holds no tensors ({reason}); give an intact copy of the run") from None


def _load(file: Path) -> dict[str, Tensor]:
    try:
        str(file).encode()
    except UnicodeEncodeError:  # safetensors opens no file whose name is not UTF-8
        return load(file.read_bytes())
    return load_file(file)


class CheckpointStore:
    """The ``checkpoints`` folder of a run. Only rank 0 writes, one checkpoint at a time."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._sound: dict[tuple[Path, int], bool] = {}  # verified by this process: path and time of its manifest

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        score: float | None,
        phase: int = 0,
        epoch: int | None = None,
    ) -> Checkpoint:
        """Write and publish a checkpoint; it replaces one of the same step.

        Args:
            step: number of steps done.
            tensors: by file and name, on any device; what is whole, contiguous and on the CPU is not copied again.
            state: plain values.
            score: of the validation, higher is better.
            phase: from 0.
            epoch: from 1.

        Raises:
            MachineError: no space or no right to write, or the run folder is gone; what was there before is untouched.
        """
        final = self.folder / f"{PUBLISHED}{step:08d}"
        aside = self.folder / f"{WRITING}{step:08d}"
        try:
            if not self.folder.exists():
                self.folder.mkdir()
                sync_folder(self.folder.parent)
            self.tidy()
            aside.mkdir()
            for name, content in tensors.items():
                save_file(_writable(content), aside / f"{name}.safetensors")
                let_umask_count(aside / f"{name}.safetensors")
            (aside / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            files = {p.name: _entry(p) for p in sorted(aside.iterdir())}
            about = {"format": FORMAT, "step": step, "phase": phase, "epoch": epoch, "score": score}
            write_atomically(aside / MANIFEST, json.dumps({**about, "files": files}, indent=1))
            self._publish(aside, final)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                self.tidy()
            reason = getattr(error, "strerror", None) or error
            raise MachineError(
                f"checkpoint {final} cannot be written: {reason}; free space or rights are needed"
            ) from error
        saved = Checkpoint(final, step, score, phase, epoch)
        self._sound[_identity(saved)] = True
        return saved

    def _publish(self, aside: Path, final: Path) -> None:
        """Give a written folder its name. At every moment the old or the new one is found by ``all``."""
        replaced = final.with_name(f"{REPLACED}{final.name}")
        if final.exists():
            final.rename(replaced)
        aside.rename(final)
        sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def tidy(self) -> None:
        """Clear away what interrupted writing and removing left; a checkpoint replaced by nothing comes back."""
        for replaced in self.folder.glob(f"{REPLACED}{PUBLISHED}*"):
            final = replaced.with_name(replaced.name.removeprefix(REPLACED))
            if not final.exists():
                replaced.rename(final)
        for prefix in (WRITING, REPLACED, REMOVING):
            for leftover in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def all(self) -> list[Checkpoint]:
        """Return the published checkpoints, oldest first, damaged ones included.

        Raises:
            CheckpointError: this user may not look into the folder.
        """
        if self.folder.is_dir():
            with told_refusals(CheckpointError):
                os.scandir(self.folder).close()  # pathlib would find nothing, and say nothing
        named = {path.name.removeprefix(REPLACED): path for path in self.folder.glob(f"{REPLACED}{PUBLISHED}*")}
        named |= {path.name: path for path in self.folder.glob(f"{PUBLISHED}*")}
        found = []
        for name, path in named.items():
            about = read_manifest(path) or {}
            number = name.removeprefix(PUBLISHED)
            if number.isdigit():
                score, phase, epoch = about.get("score"), about.get("phase", 0), about.get("epoch")
                found.append(Checkpoint(path, int(number), score, phase, epoch))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest_valid(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that passes its checksums, and why newer ones were passed over.

        Raises:
            PassingError: one cannot be read for a fault that may pass, which is no reason to go back to another.
            CheckpointError: this user may not read one.
        """
        passed_over: list[str] = []
        for checkpoint in reversed(self.all()):
            try:
                fault = examine(checkpoint.path)
            except OSError as error:
                if not passing(error):
                    if known := refusal(error):
                        raise CheckpointError(str(known)) from error
                    passed_over.append(f"{checkpoint.path.name}: it cannot be read ({error.strerror})")
                    continue
                raise PassingError(
                    f"{checkpoint.path} cannot be read ({error.strerror}), and nothing says that it is damaged; start "
                    "again when the file system answers, or remove that folder to go on from the one before"
                ) from error
            if fault is None:
                return checkpoint, passed_over
            passed_over.append(f"{checkpoint.path.name}: {fault}")
        return None, passed_over

    def best(self) -> Checkpoint | None:
        """Return the valid checkpoint of most merit (latest phase, highest score, newest); None without any score."""
        return best_of(self.all(), lambda checkpoint: verify(checkpoint.path) is None)

    def prune(self, keep: int, keep_every: int = 0, newest: int | None = None) -> None:
        """Remove all but the newest ``keep``, the best, and of every ``keep_every``-th epoch the last.

        Damaged ones count for nothing. ``newest`` is the step that was saved last: what lies beyond it was damaged when
        the run went on before it, and goes too.

        Raises:
            OSError: no right to remove.
        """
        everything = self.all()
        past = [c for c in everything if newest is None or c.step <= newest]
        kept = retained(past, keep, keep_every, self._is_sound)
        for checkpoint in everything:
            if checkpoint.path not in kept:
                # Renamed first, so that a kill in the middle leaves no folder that looks like a checkpoint.
                checkpoint.path.rename(checkpoint.path.with_name(f"{REMOVING}{checkpoint.path.name}"))
        self.tidy()

    def _is_sound(self, checkpoint: Checkpoint) -> bool:
        """Verify once per process: a folder that was published does not change."""
        try:
            identity = _identity(checkpoint)
        except OSError:
            return False
        if identity not in self._sound:
            self._sound[identity] = verify(checkpoint.path) is None
        return self._sound[identity]


def newest_or_refuse(store: CheckpointStore) -> Checkpoint:
    """Return the newest valid checkpoint, or raise CheckpointError saying what was found instead."""
    checkpoint, passed_over = store.newest_valid()
    if checkpoint is None:
        detail = f": {'; '.join(passed_over)}" if passed_over else ""
        raise CheckpointError(f"{store.folder} holds no valid checkpoint{detail}")
    return checkpoint


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _identity(checkpoint: Checkpoint) -> tuple[Path, int]:
    return checkpoint.path, (checkpoint.path / MANIFEST).stat().st_mtime_ns


def _writable(content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """safetensors refuses tensors that share memory or are not contiguous; those alone are copied."""
    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in content.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(storage.data_ptr())
        ready[name] = tensor
    return ready


def retained(
    checkpoints: Sequence[Checkpoint], keep: int, keep_every: int, is_sound: Callable[[Checkpoint], bool]
) -> set[Path]:
    """Return the folders that stay: the ``keep`` newest sound ones, the best sound one, and what is kept for ever.

    ``is_sound`` may be slow: it is asked only about candidates, newest and best first.
    """
    return {c.path for c in newest_of(checkpoints, keep, is_sound)} | {
        c.path for c in (best_of(checkpoints, is_sound), *lasting_of(checkpoints, keep_every)) if c is not None
    }


def newest_of(
    checkpoints: Iterable[Checkpoint], count: int, is_sound: Callable[[Checkpoint], bool]
) -> list[Checkpoint]:
    """Return the newest sound ones, at most ``count``."""
    found: list[Checkpoint] = []
    for checkpoint in sorted(checkpoints, key=lambda c: c.step, reverse=True):
        if len(found) == count:
            break
        if is_sound(checkpoint):
            found.append(checkpoint)
    return found


def best_of(checkpoints: Iterable[Checkpoint], is_sound: Callable[[Checkpoint], bool]) -> Checkpoint | None:
    """Return the sound one of most merit (latest phase, highest score, newest); None without any score."""
    scored = [c for c in checkpoints if c.score is not None]
    return next((c for c in sorted(scored, key=lambda c: c.merit, reverse=True) if is_sound(c)), None)


def lasting_of(checkpoints: Iterable[Checkpoint], keep_every: int) -> list[Checkpoint]:
    """Return what is kept for ever: of every ``keep_every``-th epoch the last; nothing for 0."""
    last = {c.epoch: c for c in sorted(checkpoints, key=lambda c: c.step) if c.epoch and keep_every}
    return [checkpoint for epoch, checkpoint in last.items() if epoch and epoch % keep_every == 0]
