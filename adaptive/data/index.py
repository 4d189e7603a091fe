"""index.json: what a packed dataset holds, and whether the shards beside it are those that were packed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adaptive.errors import DataError
from adaptive.files import file_sha256, write_atomically

INDEX_NAME = "index.json"
VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_Frozen):
    """One tar file: its name inside the dataset folder, samples, size in bytes and checksum."""

    # A name, never a path: a foreign index must not make us read outside its folder.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    count: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class SplitInfo(_Frozen):
    """The shards of one split, in the order that sample ids follow, and the number of samples in them."""

    shards: list[ShardInfo]
    count: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _count_is_sum(self) -> SplitInfo:
        if self.count != sum(self.counts):
            raise ValueError(f"count {self.count} is not the sum of its shards' counts, {sum(self.counts)}")
        return self

    @property
    def counts(self) -> list[int]:
        """Samples per shard."""
        return [shard.count for shard in self.shards]

    @property
    def total_bytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)


class DatasetIndex(_Frozen):
    """A packed dataset: class names in label order, splits, and a fingerprint of both."""

    version: int
    classes: list[str]
    splits: dict[str, SplitInfo]
    fingerprint: Sha256

    def split(self, name: str) -> SplitInfo:
        """Return one split (DataError with the known names when there is none of that name)."""
        if name not in self.splits:
            raise DataError(f"the dataset has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def fingerprint(classes: list[str], splits: dict[str, SplitInfo]) -> str:
    """Return the sha256 over the content: class names, splits, and every shard's count and checksum."""
    content = {"classes": classes, "splits": {name: split.model_dump() for name, split in splits.items()}}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def write_index(folder: str | Path, classes: list[str], splits: dict[str, SplitInfo]) -> DatasetIndex:
    """Write index.json into ``folder`` atomically and return what it holds."""
    index = DatasetIndex(version=VERSION, classes=classes, splits=splits, fingerprint=fingerprint(classes, splits))
    write_atomically(Path(folder) / INDEX_NAME, index.model_dump_json(indent=1) + "\n")
    return index


def load_index(folder: str | Path) -> DatasetIndex:
    """Read and verify ``folder``/index.json.

    Raises:
        DataError: the folder or the index is missing, is not one of ours, or its fingerprint does not fit its content.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    if not folder.is_dir():
        raise DataError(f"dataset folder {folder} does not exist; create it with: adaptive pack SOURCE {folder}")
    if not path.is_file():
        raise DataError(f"{folder} holds no {INDEX_NAME}; pack the images with: adaptive pack SOURCE DEST")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file's permissions") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); pack the dataset again") from None
    index = _validate(tree, path)
    if index.fingerprint != fingerprint(index.classes, index.splits):
        raise DataError(f"{path} was changed after packing: its fingerprint does not fit its content; pack again")
    return index


def check_shards(index: DatasetIndex, folder: str | Path, split: str, deep: bool = False) -> None:
    """Check that every shard of a split is present with its size, and with ``deep`` also its sha256.

    Raises:
        DataError: the split is unknown, shards are missing (listed), or one differs from what was packed.
    """
    shards = index.split(split).shards
    folder = Path(folder)
    missing = [shard.name for shard in shards if not (folder / shard.name).is_file()]
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(shards)} {split} shards: {listed}; copy them or pack again"
        )
    for shard in shards:
        path = folder / shard.name
        size = path.stat().st_size
        if size != shard.bytes:
            raise DataError(
                f"shard {path} has {size} bytes, the index says {shard.bytes}: copied incompletely or changed; "
                "copy it again or pack again"
            )
        if deep and (found := file_sha256(path)) != shard.sha256:
            raise DataError(
                f"shard {path} is damaged: sha256 {found[:12]}, the index says {shard.sha256[:12]}; "
                "copy it again or pack again"
            )


def _validate(tree: object, path: Path) -> DatasetIndex:
    version = tree.get("version") if isinstance(tree, dict) else None
    if version is None:
        raise DataError(f"{path} was not written by adaptive pack; give the folder of a packed dataset")
    if version != VERSION:
        raise DataError(f"{path} has version {version!r}, this program reads {VERSION}; pack the dataset again")
    try:
        return DatasetIndex.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise DataError(f"{path}: {where}: {first['msg']}; pack the dataset again") from None
