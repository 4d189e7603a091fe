"""index.json: the classes, splits and shards of a packed dataset, and a check that the shards are those packed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adaptive.config.sections import DataConfig
from adaptive.data.faults import MISSING, BadDataError
from adaptive.data.remote.transfer import RemoteFolder
from adaptive.data.remote.urls import is_remote, open_remote, shown_file
from adaptive.errors import DataError, nearest, refusal, told_refusals
from adaptive.files import file_sha256, write_atomically, write_new
from adaptive.foreign_text import shell_words, shown_location
from adaptive.passing_faults import patiently

INDEX_NAME = "index.json"
VERSION = 1
MOST_INDEX_BYTES = 1 << 28  # of a million shards
_MAX_COUNT = 10**12  # samples or bytes: more is no dataset, and would overflow
_PARALLEL_REQUESTS = 16
_LOG = logging.getLogger(__name__)

# A name, never a path: results of a split are written to files that bear its name.
SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _IndexModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardInfo(_IndexModel):
    """One tar file: its name inside the dataset folder, samples, size in bytes and checksum."""

    # A name, never a path: an index from elsewhere must not make us read outside its folder.
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.tar$")]
    count: Annotated[int, Field(ge=0, le=_MAX_COUNT)]
    bytes: Annotated[int, Field(ge=0, le=_MAX_COUNT)]
    sha256: Sha256


class SplitInfo(_IndexModel):
    """The shards of one split, in the order of the sample ids, and the number of samples in them."""

    shards: list[ShardInfo]
    count: Annotated[int, Field(ge=0, le=_MAX_COUNT)]

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


class DatasetIndex(_IndexModel):
    """A packed dataset: class names in label order, splits, and a fingerprint of both."""

    version: int
    classes: list[str]
    splits: dict[SplitName, SplitInfo]
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


def write_index(
    folder: str | Path, classes: list[str], splits: dict[str, SplitInfo], replace: bool = True
) -> DatasetIndex:
    """Write index.json into ``folder`` atomically and return what it holds (raises FileExistsError)."""
    index = DatasetIndex(version=VERSION, classes=classes, splits=splits, fingerprint=fingerprint(classes, splits))
    write = write_atomically if replace else write_new
    write(Path(folder) / INDEX_NAME, index.model_dump_json(indent=1) + "\n")
    return index


@told_refusals(DataError)
def load_index(folder: str | Path, settings: DataConfig | None = None, named_once: bool = True) -> DatasetIndex:
    """Read and verify ``folder``/index.json.

    Args:
        folder: of the dataset, or its URL.
        settings: how a URL is read; by default with the defaults of the configuration.
        named_once: refuse an index that names a class twice.

    Raises:
        DataError: the folder or the index is missing, is not one of ours, its fingerprint does not fit its content, or
            it names a class twice.
        ConfigError: a command instead of a folder, which data.pipe does not allow.
        MachineError: the package for this kind of URL is not installed.
    """
    if isinstance(folder, str) and is_remote(folder):
        with closing(open_remote(folder, settings or DataConfig(path=folder))) as remote:
            shown, content = remote.shown(INDEX_NAME), remote.read(INDEX_NAME, MOST_INDEX_BYTES)
    else:
        shown, content = _read_local(Path(folder))
    try:
        tree = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown} is not valid JSON ({error}); pack the dataset again") from None
    index = _validate(tree, shown)
    if index.fingerprint != fingerprint(index.classes, index.splits):
        raise DataError(f"{shown} was changed after packing: its fingerprint does not fit its content; pack again")
    if named_once and (twice := named_twice(index.classes)):
        listed = ", ".join(twice[:5])
        raise DataError(f"{shown} names {len(twice)} classes twice ({listed}); rename one of each, and pack again")
    return index


def named_twice(classes: list[str]) -> list[str]:
    """Return the names that are those of several classes."""
    return [name for name, times in Counter(classes).items() if times > 1]


def _read_local(folder: Path) -> tuple[str, bytes]:
    path = folder / INDEX_NAME
    try:
        found = patiently(folder.is_dir, folder)
        there = found and patiently(path.is_file, path)
        size = patiently(path.stat, path).st_size if there else 0
        content = patiently(path.read_bytes, path) if there and size <= MOST_INDEX_BYTES else b""
    except OSError as error:
        if refusal(error):
            raise  # told with owner and remedy
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file's permissions") from None
    if not found:
        raise DataError(
            f"dataset folder {folder} does not exist; create it with: adaptive pack SOURCE {shell_words(folder)}"
        )
    if not there:
        raise DataError(f"{folder} holds no {INDEX_NAME}; pack the images with: adaptive pack SOURCE DEST")
    if size > MOST_INDEX_BYTES:
        raise DataError(f"{path} has {size} bytes, no index has over {MOST_INDEX_BYTES}; pack the dataset again")
    return str(path), content


class IndexWatch:
    """Notices that the folder of a dataset that is being read holds another dataset by now.

    Args:
        folder: of the dataset.
        fingerprint: of the index that was read.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint
        self._seen: tuple[int, int, int] | None = None  # inode, time and size of the index

    def check(self) -> None:
        """Look at the index, and read it if it is another file than before.

        Raises:
            DataError: it is another dataset's. An index that cannot be read tells nothing.
        """
        path = self.folder / INDEX_NAME
        try:
            found = path.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
            if stamp == self._seen:
                return
            now = json.loads(path.read_bytes())["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        if now != self.fingerprint:
            raise replaced_error(str(self.folder), self.fingerprint, now)
        self._seen = stamp


def replaced_error(shown: str, then: str, now: object) -> DataError:
    """Return the error of a dataset that is another one by now, by the fingerprints of then and now."""
    return DataError(
        f"dataset {shown} was replaced by another dataset while it was read (fingerprint {then[:12]}, now "
        f"{str(now)[:12]}); start again, and pack to another folder while this one is in use"
    )


def check_split(index: DatasetIndex, key: str, name: str) -> None:
    """Refuse a split that the dataset lacks; ``key`` is the configuration key or flag that names it (DataError)."""
    if name not in index.splits:
        remedy = f"{found} " if (found := nearest(name, index.splits, most=1)) else ""
        raise DataError(
            f"{key} = {name!r} is no split of the dataset; {remedy}it has {', '.join(sorted(index.splits))}"
        )


def check_shards(
    index: DatasetIndex,
    folder: str | Path,
    split: str,
    deep: bool = False,
    settings: DataConfig | None = None,
    quiet: bool = False,
) -> None:
    """Check that every shard of a split is present with its size, and with ``deep`` also its sha256 (folders only).

    Where data.max_bad allows as many bad samples as the bad shards hold, they are warned of instead (unless ``quiet``).

    Raises:
        DataError: the split is unknown, shards are missing (listed), or one differs from what was packed.
    """
    shards = index.split(split).shards
    if isinstance(folder, str) and is_remote(folder):
        with closing(open_remote(folder, settings or DataConfig(path=folder))) as remote:
            sizes = _remote_sizes(remote, shards)
    else:
        paths = {shard.name: Path(folder) / shard.name for shard in shards}
        sizes = {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
    missing = [shard for shard in shards if shard.name not in sizes]
    changed = [
        (shard, message)
        for shard in shards
        if shard.name in sizes and (message := _difference(shard, location(folder, shard), sizes[shard.name], deep))
    ]
    messages = [message for _, message in changed]
    if missing:
        listed = ", ".join(shard.name for shard in missing[:5])
        listed += f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        messages.insert(
            0,
            f"{shown_location(folder)} lacks {len(missing)} of {len(shards)} {split} shards: {listed}; copy them or "
            "pack again",
        )
    bad = sum(shard.count for shard in [*missing, *(shard for shard, _ in changed)])
    if messages and bad > (settings.max_bad if settings else 0):
        raise DataError(messages[0])
    for message in [] if quiet else messages:
        _LOG.warning("%s (data.max_bad allows it)", message)


def _difference(shard: ShardInfo, shown: str, size: int | None, deep: bool) -> str | None:
    """Return how an existing shard differs from the one that was packed, None where it does not."""
    if size is not None and size != shard.bytes:
        return (
            f"shard {shown} has {size} bytes, the index says {shard.bytes}: copied incompletely or changed; copy it "
            "again or pack again"
        )
    if deep and (digest := file_sha256(Path(shown))) != shard.sha256:
        return (
            f"shard {shown} is damaged: sha256 {digest[:12]}, the index says {shard.sha256[:12]}; copy it again or "
            "pack again"
        )
    return None


def location(folder: str | Path, shard: ShardInfo) -> str:
    """Return a shard's path or URL, for messages: without secrets."""
    remote = isinstance(folder, str) and is_remote(folder)
    return shown_file(str(folder), shard.name) if remote else str(Path(folder, shard.name))


def _remote_sizes(remote: RemoteFolder, shards: list[ShardInfo]) -> dict[str, int | None]:
    """Return the sizes of many shards, requested in parallel; those that do not exist are left out."""
    found: dict[str, int | None] = {}
    with ThreadPoolExecutor(_PARALLEL_REQUESTS, thread_name_prefix="sizes") as pool:
        futures = {pool.submit(remote.size, shard.name): shard.name for shard in shards}
        for future in as_completed(futures):
            try:
                found[futures[future]] = future.result()
            except BadDataError as error:
                if error.kind != MISSING:  # the store's fault, not one shard's: the others need not be tried
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
    return found


def _validate(tree: object, path: str) -> DatasetIndex:
    version = tree.get("version") if isinstance(tree, dict) else None
    if version is None:
        raise DataError(f"{path} was not written by adaptive pack; give the folder of a packed dataset")
    if version != VERSION:
        raise DataError(
            f"{path} has version {repr(version)[:40]}, this program reads {VERSION}; pack the dataset again"
        )
    try:
        return DatasetIndex.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "content"
        raise DataError(f"{path}: {where}: {first['msg']}; pack the dataset again") from None
