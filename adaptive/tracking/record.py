"""The record of a run: its metrics in ``metrics.jsonl``, one JSON object per line, from which all else is derived.

A record carries ``step`` (optimizer steps taken), ``epoch``, ``samples`` (images seen) and metrics under keys such as
``train/loss`` or ``val/exit_1/top1`` (percent). JSON knows no infinities, and ``null`` would hide which one it was, so
numbers that are not finite are written as the strings "nan", "inf" and "-inf"; ``read`` turns them back into floats.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from adaptive.errors import DataError, MachineError
from adaptive.files import write_atomically

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Record:
    """Append-only writer of a run's records; it belongs to rank 0 alone.

    Every record is appended as a whole line by a single write, so a kill at any moment leaves at most one incomplete
    line, the last one. Opening an existing file drops such a line.

    Raises:
        MachineError: the file cannot be read or written (disk full, read-only, no such folder), from any method.
        DataError: a line other than the last is damaged (``trim``).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._drop_incomplete_line()
        except OSError as error:
            raise _machine_error("open", self.path, error) from error

    def write(self, values: dict[str, Any]) -> None:
        """Append one record; ``values`` must hold an integer ``step``. Scalars of numpy and torch are accepted."""
        if not isinstance(values.get("step"), int):
            raise ValueError(f"a record needs an integer 'step', got {values.get('step')!r}")
        line = (json.dumps(_plain(values), allow_nan=False) + "\n").encode()
        try:
            self._append(line)
        except OSError as error:
            raise _machine_error("write", self.path, error) from error

    def trim(self, step: int, validated: bool = True) -> None:
        """Drop an incomplete last line and every record after ``step``, as if the run had never gone further.

        Without ``validated`` the validation of ``step`` itself is dropped as well: it will be measured again.
        The kept lines stay byte for byte as they were; the file is replaced atomically.
        """
        try:
            if not self.path.exists():
                return
            lines = self.path.read_bytes().splitlines(keepends=True)
            last = step if validated else step - 1
            kept = [
                line
                for line, record in _parse(lines, self.path)
                if record["step"] <= (last if any(key.startswith("val/") for key in record) else step)
            ]
            if kept != lines:
                write_atomically(self.path, b"".join(kept))
        except OSError as error:
            raise _machine_error("trim", self.path, error) from error

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, size)
                raise OSError(f"only {written} of {len(line)} bytes could be written, is the disk full?")
        finally:
            os.close(descriptor)

    def _drop_incomplete_line(self) -> None:
        if not self.path.exists() or not stat.S_ISREG(self.path.stat().st_mode):
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return all records of a run in the order written; an incomplete last line, as a kill leaves it, is skipped.

    Raises:
        MachineError: the file cannot be read.
        DataError: another line is no record.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise _machine_error("read", path, error) from error
    return [{key: _number(value) for key, value in record.items()} for _, record in _parse(lines, path)]


def _parse(lines: list[bytes], path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return every complete line with its record."""
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            parsed.append((line, record))
        elif number < len(lines):
            raise DataError(
                f"{path}, line {number}: not a record (a JSON object with an integer step); remove or mend that line"
            )
    return parsed


def _plain(value: Any) -> Any:
    """Return ``value`` in types of JSON."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _number(value: Any) -> Any:
    """Return numbers that are not finite as floats again, the inverse of ``_plain``."""
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _number(entry) for key, entry in value.items()}
    return value


def _machine_error(action: str, path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"cannot {action} the record {path}: {error.strerror or error}; free disk space, or check that the folder "
        "exists and may be written (train.run_folder)"
    )
