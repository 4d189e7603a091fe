"""Upload of offline runs to W&B: all starts of a run, in order, as one W&B run."""

from __future__ import annotations

import base64
import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from adaptive.errors import MachineError, reason_of
from adaptive.locks import Lock, LockHeldError
from adaptive.tracking.wandb_server import run_client

# A .wandb file is a LevelDB log: a header, then blocks of chunks, each with checksum, length and kind.
MAGIC, FILE_HEADER, BLOCK, CHUNK = b":W&B", 7, 2**15, struct.Struct("<IHB")
FULL, FIRST, LAST = 1, 2, 4  # kinds of chunks: all of a record, its beginning, its end
FIRSTS = 50  # records of a file, of which one says where the run belongs
CLIENT = Path(__file__).with_name("wandb_client.py")


@dataclass(frozen=True)
class SyncResult:
    """The outcome of a run's upload: the number of starts uploaded now and ``before``, or the reason of its failure.

    ``empty`` starts were killed before anything was written.
    """

    run: str
    id: str
    starts: int = 0
    before: int = 0
    empty: int = 0
    fault: str = ""

    @property
    def summary(self) -> str:
        """The outcome in one line."""
        if self.fault:
            return f"{self.run}: not uploaded: {self.fault}"
        before = f", {self.before} before" if self.before else ""
        empty = f", {self.empty} empty" if self.empty else ""
        starts = f"{self.starts} start{'' if self.starts == 1 else 's'} uploaded"
        return f"{self.run}: {starts}{before}{empty} (W&B run {self.id})"


def offline_starts(run: str | Path) -> list[Path]:
    """Return the files of a run folder's offline starts, first start first (raises MachineError if there are none)."""
    folder = Path(run) / "wandb"
    # W&B names the folders offline-run-YYYYMMDD_HHMMSS-ID: their names' order is that of the starts.
    files = sorted(folder.glob("offline-run-*/run-*.wandb"))
    if not files:
        what = "is no folder" if not Path(run).is_dir() else "holds no wandb/offline-run-* folders"
        raise MachineError(f"{run} {what}; give run folders that were trained with tracking.wandb=offline")
    for start in files:
        check_links(start.parent, Path(run))
    return files


def check_links(start: Path, run: Path) -> None:
    """Refuse a start with a link out of the run folder, through which more would be uploaded (raises MachineError)."""
    home = run.resolve()
    for path in (start, *start.glob("*"), *start.glob("files/**/*")):
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise MachineError(
                f"{path} is a link to {path.resolve()}, outside of {run}, and would be uploaded; remove it"
            )


def sync(run: str | Path, limit: float, entity: str | None = None) -> SyncResult:
    """Upload a run's offline starts through ``wandb sync``; those that are uploaded already are skipped.

    Args:
        run: run folder.
        limit: seconds for this run.
        entity: W&B user or team that gets it, whatever the files say.
    """
    files = offline_starts(run)
    ids = list(dict.fromkeys(file.stem.removeprefix("run-") for file in files))
    named, missing = ", ".join(ids), _missing(files)
    before = len(files) - len(missing)
    if in_progress(run):
        return SyncResult(str(run), named, fault="it is being trained; upload it when it has ended")
    try:
        due = [file for file in missing if mend(file)]
    except OSError as error:
        return SyncResult(str(run), named, fault=f"{error.filename}: {error.strerror}")
    empty = len(missing) - len(due)
    if not due:
        return SyncResult(str(run), named, before=before, empty=empty)
    # W&B's client reads settings, a server's address among them, from the folder that its logs go to.
    with TemporaryDirectory(prefix="adaptive-sync-") as aside:
        words = ["-m", "wandb", "sync", *(["--entity", entity] if entity else [])]
        words += [str(file.parent.resolve()) for file in due]
        ended = run_client(words, limit, folder=aside)
    if ended.code is None:
        return SyncResult(str(run), named, fault=f"not done within {limit:g} s; give more with --timeout")
    # The client's exit code is 0 also where a run was refused; of an uploaded file it leaves a mark beside it.
    if missing := _missing(due):
        first = missing[0].parent.name
        reason = _reason([*ended.out.splitlines(), *ended.err.splitlines()])
        return SyncResult(str(run), named, fault=f"{len(missing)} of {len(due)} starts, the first {first}: {reason}")
    return SyncResult(str(run), named, len(due), before, empty)


def mend(file: Path) -> bool:
    """Truncate a start's file after its last complete record, and return whether it holds any.

    A start that was killed ends in an incomplete one, and the client would refuse all later starts of its run as well.
    """
    content = file.read_bytes()
    if not content.startswith(MAGIC):
        return len(content) > FILE_HEADER  # another format, which the client will refuse
    ends = [FILE_HEADER, *(end for _, end in complete_records(content))]
    if ends[-1] < len(content):
        os.truncate(file, ends[-1])
    return len(ends) > 2  # the first one holds only the client's version


def complete_records(content: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield every complete record of a start's file, in W&B's own protocol, and where it ends."""
    offset, begun = FILE_HEADER, b""
    while offset + CHUNK.size <= len(content):
        if BLOCK - offset % BLOCK < CHUNK.size:
            offset += BLOCK - offset % BLOCK
            continue
        _, length, kind = CHUNK.unpack_from(content, offset)
        begun = (b"" if kind in (FULL, FIRST) else begun) + content[offset + CHUNK.size : offset + CHUNK.size + length]
        offset += CHUNK.size + length
        if not FULL <= kind <= LAST or offset > len(content):
            return
        if kind in (FULL, LAST):
            yield begun, offset


def entities(runs: Iterable[str | Path], limit: float) -> dict[str, set[str]]:
    """Return for each run folder the W&B users or teams that its files name (raises MachineError as the client fails).

    ``limit`` is in seconds. A file that names none goes to the account's own.
    """
    every = {str(run): offline_starts(run) for run in runs}
    firsts = {
        run: [base64.b64encode(r).decode() for f in files for r, _ in islice(complete_records(f.read_bytes()), FIRSTS)]
        for run, files in every.items()
    }
    with TemporaryDirectory(prefix="adaptive-sync-") as aside:
        ended = run_client([str(CLIENT), "entities"], limit, json.dumps(firsts), aside)
    try:
        return {run: set(found) for run, found in json.loads(ended.out).items()}
    except ValueError:
        reason = (ended.err.strip().splitlines() or [f"not done within {limit:g} s"])[-1]
        raise MachineError(f"the W&B client cannot read what was recorded offline: {reason_of(reason)}") from None


def in_progress(run: str | Path) -> bool:
    """Whether a training process has locked the run folder; what it writes after an upload would be missing there."""
    path = Path(run) / ".lock"
    if not path.exists():
        return False
    try:
        Lock(path).acquire().release()
    except LockHeldError as held:
        return not held.silent
    except OSError:  # a folder of somebody else's
        return False
    return False


def _missing(files: list[Path]) -> list[Path]:
    return [file for file in files if not file.with_name(f"{file.name}.synced").exists()]


def _reason(printed: list[str]) -> str:
    """Return the line that holds the client's error, or its last line."""
    lines = [line.removeprefix("wandb: ").strip() for line in printed if line.strip()]
    faults = [line for line in lines if line.startswith(("ERROR", "Error"))]
    return (faults or lines or ["wandb sync said nothing"])[-1 if not faults else 0][:300]
