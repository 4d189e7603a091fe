"""Random access to the samples of tar shards: headers are read once, samples by their offsets."""

from __future__ import annotations

import errno
import mmap
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adaptive.data.faults import COUNT, LABEL, MEMBER, MISSING, TRUNCATED, UNREADABLE, BadDataError
from adaptive.data.shards.index import ShardInfo
from adaptive.data.shards.tar_headers import BROKEN, HeaderReader, members
from adaptive.errors import one_line

# What pack writes. Members of any other kind, pickles above all, are never read.
_IMAGES = {"jpg", "jpeg", "png"}
_LABEL_BYTES = 64  # of a number; more is none
_KEY_BYTES = 250  # of a key that are kept for messages
_ATTEMPTS = 4
_FIRST_PAUSE = 0.25  # seconds, doubled after every failed attempt


class ShardFiles(Protocol):
    """Where the shards of a split are."""

    def open(self, shard: ShardInfo) -> int:
        """Return a descriptor of a shard's file (raises OSError, BadDataError)."""

    def shown(self, shard: ShardInfo) -> str:
        """Return its place for messages."""

    def close(self) -> None:
        """Close connections."""


@dataclass(frozen=True)
class LocalFiles:
    """Shards in a folder of this machine, read where they are."""

    folder: Path

    def open(self, shard: ShardInfo) -> int:
        """Return a descriptor of a shard's file (raises OSError)."""
        return os.open(self.folder / shard.name, os.O_RDONLY)

    def shown(self, shard: ShardInfo) -> str:
        """Return its path."""
        return str(self.folder / shard.name)

    def close(self) -> None:
        """Do nothing: there are no connections."""


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: the shard it came from, its key, image bytes and label."""

    shard: str
    key: str
    image: bytes
    label: int


@dataclass
class ReadCounts:
    """What a reader asked of the disk.

    Attributes:
        opens: files opened.
        reads: pieces read, two for a sample.
        bytes: their size.
        forward: reads of a shard that began where the one before ended, or behind.
        backward: reads that began before that.
    """

    opens: int = 0
    reads: int = 0
    bytes: int = 0
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class _Table:
    """Places of a shard's samples: rows of image offset and size, label offset and size (bytes), and their keys.

    A sample that lacks one of the two has a row of -1, and an entry in ``lacking``.
    """

    places: NDArray[np.int64]
    keys: NDArray[np.bytes_]
    lacking: dict[int, str]


class ShardReader:
    """Reads samples of one split by shard and position, with few files open at a time.

    ``split_name`` is WebDataset's rule that divides a member's name into key and extension. A shard's headers are
    scanned at its first use and kept (about 50 bytes per sample); ``capacity`` shards stay open.
    """

    def __init__(
        self,
        files: ShardFiles,
        shards: Sequence[ShardInfo],
        split_name: Callable[[str], tuple[str | None, str | None]],
        capacity: int,
    ) -> None:
        self.files = files
        self.shards = shards
        self.capacity = capacity
        self.done = ReadCounts()
        self._split_name = split_name
        self._tables: dict[int, _Table] = {}
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

    def close(self) -> None:
        """Close all files, and the connections they came by."""
        for shard in list(self._open):
            self._forget(shard)
        self.files.close()

    def _read(self, shown: str, shard: int, position: int) -> RawSample:
        descriptor = self._descriptor(shard)
        if shard not in self._tables:
            self._tables[shard] = self._scan(shown, descriptor, self.shards[shard])
        table = self._tables[shard]
        key = one_line(table.keys[position].decode(errors="replace"))
        if position in table.lacking:
            raise BadDataError(f"shard {shown}, sample {key}: {table.lacking[position]}; pack again", MEMBER, key)
        image_at, image_size, label_at, label_size = (int(value) for value in table.places[position])
        image = self._piece(shard, descriptor, image_at, image_size)
        text = self._piece(shard, descriptor, label_at, min(label_size, _LABEL_BYTES))
        if len(image) != image_size or len(text) < min(label_size, _LABEL_BYTES):
            message = f"shard {shown}, sample {key}: the file ends too early; copy it again or pack again"
            raise BadDataError(message, TRUNCATED, key)
        try:
            return RawSample(shown, key, image, int(text))
        except ValueError:
            message = f"shard {shown}, sample {key}: label {text[:20]!r} is not a number; pack again"
            raise BadDataError(message, LABEL, key) from None

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
        if hasattr(os, "posix_fadvise"):
            # Samples are read in small pieces from anywhere in it: let the disk bring it in one go.
            with suppress(OSError):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        return descriptor

    def _forget(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def _scan(self, shown: str, descriptor: int, shard: ShardInfo) -> _Table:
        if (size := os.fstat(descriptor).st_size) < shard.bytes:
            message = f"shard {shown} has {size} bytes, the index says {shard.bytes}; copy it again or pack again"
            raise BadDataError(message, TRUNCATED, whole=True)
        samples = samples_of(shown, descriptor, self._split_name)
        if len(samples) != shard.count:
            message = f"shard {shown} holds {len(samples)} samples, the index says {shard.count}; pack again"
            raise BadDataError(message, COUNT, whole=True)
        lacking: dict[int, str] = {}
        places = np.full((len(samples), 4), -1, dtype=np.int64)
        for number, (_, parts) in enumerate(samples):
            image = next((parts[extension] for extension in parts if extension in _IMAGES), None)
            if image is None or "cls" not in parts:
                missing = "image (jpg or png)" if image is None else "label (cls)"
                lacking[number] = f"has no {missing}, only {', '.join(sorted(parts))}"
            else:
                places[number] = (*image, *parts["cls"])
        return _Table(
            places,
            np.array([key.encode(errors="replace")[:_KEY_BYTES] for key, _ in samples], dtype=np.bytes_),
            lacking,
        )


def samples_of(
    shown: str, descriptor: int, split_name: Callable[[str], tuple[str | None, str | None]]
) -> list[tuple[str, dict[str, tuple[int, int]]]]:
    """Return the samples of a shard: key, and by extension where the member's bytes are (offset and size)."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    for name, offset, size in _members(shown, descriptor):
        key, extension = split_name(name)
        if key is None or extension is None:
            continue
        if not samples or samples[-1][0] != key:
            samples.append((key, {}))
        samples[-1][1][extension.lower()] = (offset, size)
    return samples


def _members(shown: str, descriptor: int) -> list[tuple[str, int, int]]:
    """Return name, offset of the data and size in bytes of every file in a tar.

    Every worker scans every shard, and tarfile takes ten times as long as the two fields need: read them directly, and
    leave anything but the plain headers that pack writes (long names, links) to tarfile.
    """
    found = []
    try:
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
            place = 0
            while (header := content[place : place + tarfile.BLOCKSIZE]).strip(b"\0"):
                if header[156:157] != tarfile.REGTYPE or header[257:262] != b"ustar" or header[345] or header[99]:
                    return _members_of_any_tar(shown, descriptor)
                size = int(header[124:135], 8)
                if size < 0 or place + tarfile.BLOCKSIZE + size > len(content):
                    return _members_of_any_tar(shown, descriptor)
                found.append((header[: header.index(0)].decode(), place + tarfile.BLOCKSIZE, size))
                place += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except (ValueError, IndexError):  # no numbers or text where they belong, cut off, or an empty file
        return _members_of_any_tar(shown, descriptor)
    return found


def _members_of_any_tar(shown: str, descriptor: int) -> list[tuple[str, int, int]]:
    """Do the same for any tar; files with holes are passed over, of one that is cut off one byte too much is told."""
    end = os.fstat(descriptor).st_size
    found = []
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            with tarfile.open(fileobj=HeaderReader(file), mode="r:") as tar:  # type: ignore[call-overload]
                for member in members(tar):
                    if member.isreg() and not member.issparse():
                        found.append((member.name, member.offset_data, min(member.size, end - member.offset_data + 1)))
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        message = f"shard {shown} is not a tar file ({error}); copy it again or pack again"
        raise BadDataError(message, MEMBER, whole=True) from None
    return found


def split_name(name: str) -> tuple[str | None, str | None]:
    """WebDataset's rule: the extension begins at the first dot of the file's name, folders included in the key."""
    folder, _, file = name.rpartition("/")
    key, dot, extension = file.partition(".")
    if not key or not dot:
        return None, None
    return (f"{folder}/{key}" if folder else key), extension
