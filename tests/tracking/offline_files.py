"""Reads the files that the W&B client writes: records of its own protocol in LevelDB's log format."""

import struct
from pathlib import Path
from typing import Any

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7


def records(file: Path) -> list[Any]:
    """Return the protocol's records in order; what a kill cut off at the end is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, found, begun = file.read_bytes(), FILE_HEADER, [], b""
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += HEADER
        begun = (b"" if kind in (1, 2) else begun) + content[position : position + length]
        position += length
        if kind in (1, 4) and position <= len(content):  # whole, or the last part of one
            found.append(Record.FromString(begun))
    return found


def of_kind(folder: Path, kind: str) -> list[Any]:
    """Return the records of one kind (``run``, ``history``, ``alert``, ``artifact`` ...) of all starts, in order."""
    files = sorted(folder.glob("wandb/*run-*/run-*.wandb"))
    assert files, f"no W&B files below {folder}"
    every = [record for file in files for record in records(file)]
    return [getattr(record, kind) for record in every if record.WhichOneof("record_type") == kind]


def items(record: Any) -> dict[str, Any]:
    """Return a history record's values, or a run record's configuration."""
    import json

    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record}
