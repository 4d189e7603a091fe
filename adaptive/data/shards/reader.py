"""Random access to the samples of tar shards: the headers of a shard are read once, then samples by their offsets."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive.data.faults import CHECKSUM, COUNT, LABEL, MEMBER, MISSING, TRUNCATED, UNREADABLE, BadDataError
from adaptive.data.shards.index import IndexWatch, ShardInfo
from adaptive.data.shards.tar_members import members_of
from adaptive.errors import one_line

# Extensions that pack writes. Members of any other kind, pickles above all, are never read.
IMAGE_EXTENSIONS = {"jpg", "jpeg", "png"}
LABEL_BYTES = 64  # a longer text is no label
_KEY_BYTES = 250  # of a key that are kept for messages
_ATTEMPTS = 4
_FIRST_PAUSE = 0.25  # seconds, doubled after every failed attempt

FileIdentity = tuple[int, int, int, int]  # device, inode, size in bytes, modification time in ns


class ShardFiles(Protocol):
    """Opens shards, wherever they are: the interface of `LocalFiles` and `adaptive.data.shards.cache.ShardCache`."""

    def open(self, shard: ShardInfo) -> int:
        """Return a descriptor of a shard's file (raises OSError, BadDataError)."""

    def shown(self, shard: ShardInfo) -> str:
        """Return a shard's path or URL for messages."""

    def holds(self, shard: ShardInfo) -> bool:
        """Say whether a shard can be opened without fetching it."""

    def close(self) -> None:
        """Close connections."""


@dataclass(frozen=True)
class LocalFiles:
    """Shards in a folder of this machine, read where they are; ``watch`` notices when the dataset is replaced."""

    folder: Path
    watch: IndexWatch | None = None

    def open(self, shard: ShardInfo) -> int:
        """Return a descriptor of a shard's file (raises OSError, and DataError where it is another dataset's)."""
        descriptor = None
        try:
            descriptor = os.open(self.folder / shard.name, os.O_RDONLY)
        finally:  # a shard that is missing may have gone with its dataset, which says more
            try:
                if self.watch is not None:
                    self.watch.check()
            except BaseException:
                if descriptor is not None:
                    os.close(descriptor)
                raise
        return descriptor

    def shown(self, shard: ShardInfo) -> str:
        """Return its path."""
        return str(self.folder / shard.name)

    def holds(self, shard: ShardInfo) -> bool:
        """Say yes: where it is missing, opening it says so."""
        return True

    def close(self) -> None:
        """Do nothing: there are no connections."""


@dataclass(frozen=True)
class RawSample:
    """A sample as stored: its shard, key, undecoded image bytes, and label."""

    shard: str
    key: str
    image: bytes
    label: int


@dataclass
class ReadCounts:
    """Counts of a reader's disk accesses.

    Attributes:
        opens: files opened.
        reads: read calls, two for a sample.
        bytes: read by them.
        forward: reads that began at or after the end of the previous one in the same shard.
        backward: the other reads.
    """

    opens: int = 0
    reads: int = 0
    bytes: int = 0
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class ShardTable:
    """Offsets of a shard's samples: rows of image offset and size, label offset and size (bytes), and their keys.

    A sample that lacks one of the two has a row of -1, and an entry in ``incomplete``. ``file`` is the file that they
    are of.
    """

    offsets: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    incomplete: dict[int, str]
    file: FileIdentity


class ShardReader:
    """Reads samples of one split by shard and position in it, with at most ``capacity`` files open at a time.

    A shard's headers are scanned at its first use and kept in ``tables``, by its number (about 50 bytes per sample);
    other readers of the split may go on with them. ``done`` counts disk accesses.
    """

    def __init__(
        self,
        files: ShardFiles,
        shards: Sequence[ShardInfo],
        capacity: int,
        tables: dict[int, ShardTable] | None = None,
    ) -> None:
        self.files = files
        self.shards = shards
        self.capacity = capacity
        self.done = ReadCounts()
        self._tables = {} if tables is None else tables
        self._open: OrderedDict[int, int] = OrderedDict()
        self._ends: dict[int, int] = {}

    def read(self, shard: int, position: int) -> RawSample:
        """Return one sample.

        Raises:
            BadDataError: the shard cannot be read after several attempts, is not what the index says, or the label is
                not a number; names the shard and the key.
        """
        shown = self.files.shown(self.shards[shard])
        for attempt in range(_ATTEMPTS):
            try:
                return self._read(shown, shard, position)
            except OSError as error:
                # Network file systems fail for moments and drop handles: open the file anew after a pause.
                self._forget(shard)
                missing = isinstance(error, FileNotFoundError)
                if missing or attempt == _ATTEMPTS - 1:
                    message = f"shard {shown} cannot be read: {error.strerror or error}; check the file system"
                    raise BadDataError(message, MISSING if missing else UNREADABLE, whole=missing) from None
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def scan_those_here(self, shards: Iterable[int]) -> None:
        """Scan the headers of shards, by their numbers, that need not be fetched, and close them.

        Those that cannot be scanned are left to `read`, which says why.
        """
        for shard in shards:
            if shard not in self._tables and self.files.holds(self.shards[shard]):
                with suppress(OSError, BadDataError):
                    self._table(self.files.shown(self.shards[shard]), shard, self._descriptor(shard))
                self._forget(shard)

    def close(self) -> None:
        """Close all files, and the connections to a store."""
        for shard in list(self._open):
            self._forget(shard)
        self.files.close()

    def _read(self, shown: str, shard: int, position: int) -> RawSample:
        descriptor = self._descriptor(shard)
        table = self._table(shown, shard, descriptor)
        key = one_line(table.keys[position].decode(errors="replace"))
        if position in table.incomplete:
            raise BadDataError(f"shard {shown}, sample {key}: {table.incomplete[position]}", MEMBER, key)
        image_at, image_size, label_at, label_size = (int(value) for value in table.offsets[position])
        image = self._piece(shard, descriptor, image_at, image_size)
        text = self._piece(shard, descriptor, label_at, min(label_size, LABEL_BYTES))
        if len(image) != image_size or len(text) < min(label_size, LABEL_BYTES):
            message = f"shard {shown}, sample {key}: the file ends too early; copy it again or pack again"
            raise BadDataError(message, TRUNCATED, key)
        try:
            return RawSample(shown, key, image, int(text))
        except ValueError:
            message = f"shard {shown}, sample {key}: label {text[:20]!r} is not a number; pack again"
            raise BadDataError(message, LABEL, key) from None

    def _table(self, shown: str, shard: int, descriptor: int) -> ShardTable:
        if shard not in self._tables:
            self._tables[shard] = self._scan(shown, descriptor, self.shards[shard])
        return self._tables[shard]

    def _piece(self, shard: int, descriptor: int, offset: int, size: int) -> bytes:
        done = self.done
        if offset >= self._ends.get(shard, 0):
            done.forward += 1
        else:
            done.backward += 1
        content = os.pread(descriptor, size, offset)
        self._ends[shard] = offset + len(content)
        done.reads += 1
        done.bytes += len(content)
        return content

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self.capacity:
            self._forget(next(iter(self._open)))
        descriptor = self.files.open(self.shards[shard])
        self._open[shard] = descriptor
        self._ends[shard] = 0
        self.done.opens += 1
        if shard in self._tables and self._tables[shard].file != _identity(descriptor):
            del self._tables[shard]  # of a file that was replaced since
        if hasattr(os, "posix_fadvise"):
            # Samples are read in small pieces from anywhere in the shard: let the kernel read all of it ahead.
            with suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        return descriptor

    def _forget(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def _scan(self, shown: str, descriptor: int, shard: ShardInfo) -> ShardTable:
        if (size := os.fstat(descriptor).st_size) != shard.bytes:
            message = f"shard {shown} has {size} bytes, the index says {shard.bytes}; copy it again or pack again"
            raise BadDataError(message, TRUNCATED if size < shard.bytes else CHECKSUM, whole=True)
        samples = samples_of(shown, descriptor)
        if len(samples) != shard.count:
            message = f"shard {shown} holds {len(samples)} samples, the index says {shard.count}; pack again"
            raise BadDataError(message, COUNT, whole=True)
        incomplete: dict[int, str] = {}
        offsets = np.full((len(samples), 4), -1, dtype=np.int64)
        for number, (_, parts) in enumerate(samples):
            image = next((parts[extension] for extension in parts if extension in IMAGE_EXTENSIONS), None)
            if image is None or "cls" not in parts:
                incomplete[number] = lacking(image is not None, parts)
            else:
                offsets[number] = (*image, *parts["cls"])
        return ShardTable(
            offsets,
            np.array([key.encode(errors="replace")[:_KEY_BYTES] for key, _ in samples], dtype=np.bytes_),
            incomplete,
            _identity(descriptor),
        )


def _identity(descriptor: int) -> FileIdentity:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def samples_of(shown: str, descriptor: int) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Return the samples of a shard: key, and offset and size of each member's bytes, by extension."""
    return group_samples(members_of(shown, descriptor))


def group_samples(members: Iterable[tuple[str, int, int]]) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Return the samples that members make, given by name, offset and size; members that macOS adds belong to none."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for name, offset, size in members:
        key, extension = split_name(name)
        if key is None or extension is None or is_apple_double(name):
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][extension.lower()] = (offset, size)
    return samples


def lacking(has_image: bool, parts: Iterable[str]) -> str:
    """Return what a sample of these members lacks, and what to do."""
    parts = sorted(parts)
    missing = "label (cls)" if has_image else "image (jpg, jpeg or png)"
    sentence = f"has no {missing}, only {', '.join(parts)}"
    dotted = [part for part in parts if part.rpartition(".")[2] in {*IMAGE_EXTENSIONS, "cls"} and "." in part]
    if dotted:
        return f"{sentence}; a key ends at the first dot of a name: rename it, with no other dot than the extension's"
    if has_image and "json" in parts:
        return (
            f"{sentence}; a class in json or txt, as img2dataset writes, is not read: add a member cls with the "
            "class's number, or unpack the images into class folders and pack these"
        )
    return f"{sentence}; add it, or remove the sample"


def is_apple_double(name: str) -> bool:
    """Say whether a member is the second part, of attributes, that tar on macOS adds to a file: ``a/._1.jpg``."""
    return "/._" in name or name.startswith(("._", "__MACOSX/"))


def split_name(name: str) -> tuple[str | None, str | None]:
    """Return key and extension of a member's name by WebDataset's rule, None for both where there is no key.

    The extension begins at the first dot of the file's name, the key holds its folders. This equals webdataset's
    ``base_plus_ext``, a regular expression that takes quadratic time on long names; a test compares them.
    """
    dot = name.find(".", name.rfind("/") + 1)
    start = name.partition("\n")[0].rfind("/", 0, max(dot - 1, 0)) + 1
    if dot < 1 or "." in name[start:dot]:
        return None, None
    return name[:dot], name[dot + 1 :]
