"""Random access to the samples of tar shards: headers are read once, samples by their offsets."""

from __future__ import annotations

import mmap
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptive.data.index import ShardInfo
from adaptive.errors import DataError

# What pack writes. Members of any other kind, pickles above all, are never read.
_IMAGES = {"jpg", "jpeg", "png"}
_ATTEMPTS = 4
_FIRST_PAUSE = 0.25  # seconds, doubled after every failed attempt


@dataclass(frozen=True)
class Raw:
    """One sample as stored: the shard it came from, its key, image bytes and label."""

    shard: Path
    key: str
    image: bytes
    label: int


@dataclass(frozen=True)
class _Table:
    """Places of a shard's samples: rows of image offset and size, label offset and size (bytes), and their keys."""

    places: NDArray[np.int64]
    keys: NDArray[np.bytes_]


class ShardReader:
    """Reads samples of one split by shard and position, with few files open at a time.

    ``split_name`` is WebDataset's rule that divides a member's name into key and extension. A shard's headers are
    scanned at its first use and kept (about 50 bytes per sample); ``capacity`` shards stay open.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardInfo],
        split_name: Callable[[str], tuple[str | None, str | None]],
        capacity: int,
    ) -> None:
        self.folder = folder
        self.shards = shards
        self.capacity = capacity
        self.opens = 0
        self._split_name = split_name
        self._tables: dict[int, _Table] = {}
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, position: int) -> Raw:
        """Return one sample.

        Raises:
            DataError: the shard cannot be read after several attempts, is not what the index says, or the label is
                not a number; names the shard and the key.
        """
        path = self.folder / self.shards[shard].name
        for attempt in range(_ATTEMPTS):
            try:
                return self._read(path, shard, position)
            except OSError as error:
                # Network file systems fail for moments and drop handles: open the file anew after a pause.
                self._forget(shard)
                if isinstance(error, FileNotFoundError) or attempt == _ATTEMPTS - 1:
                    raise DataError(
                        f"shard {path} cannot be read: {error.strerror or error}; check the file system"
                    ) from None
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def close(self) -> None:
        """Close all files."""
        for shard in list(self._open):
            self._forget(shard)

    def _read(self, path: Path, shard: int, position: int) -> Raw:
        descriptor = self._descriptor(path, shard)
        if shard not in self._tables:
            self._tables[shard] = self._scan(path, self.shards[shard].count)
        table = self._tables[shard]
        image_at, image_size, label_at, label_size = (int(value) for value in table.places[position])
        key = table.keys[position].decode()
        image = os.pread(descriptor, image_size, image_at)
        text = os.pread(descriptor, label_size, label_at)
        if len(image) != image_size or len(text) != label_size:
            raise DataError(f"shard {path}, sample {key}: the file ends too early; copy it again or pack again")
        try:
            return Raw(path, key, image, int(text))
        except ValueError:
            raise DataError(f"shard {path}, sample {key}: label {text[:20]!r} is not a number; pack again") from None

    def _descriptor(self, path: Path, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self.capacity:
            self._forget(next(iter(self._open)))
        self._open[shard] = os.open(path, os.O_RDONLY)
        self.opens += 1
        return self._open[shard]

    def _forget(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)

    def _scan(self, path: Path, count: int) -> _Table:
        samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
        for name, offset, size in _members(path):
            key, extension = self._split_name(name)
            if key is None or extension is None:
                continue
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            samples[-1][1][extension.lower()] = (offset, size)
        if len(samples) != count:
            raise DataError(f"shard {path} holds {len(samples)} samples, the index says {count}; pack again")
        places = np.array([_place(path, key, parts) for key, parts in samples], dtype=np.int64).reshape(-1, 4)
        return _Table(places, np.array([key.encode() for key, _ in samples], dtype=np.bytes_))


def _members(path: Path) -> list[tuple[str, int, int]]:
    """Return name, offset of the data and size in bytes of every file in a tar.

    Every worker scans every shard, and tarfile takes ten times as long as the two fields need: read them directly, and
    leave anything but the plain headers that pack writes (long names, links) to tarfile.
    """
    found = []
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            place = 0
            while (header := content[place : place + tarfile.BLOCKSIZE]).strip(b"\0"):
                if header[156:157] != tarfile.REGTYPE or header[257:262] != b"ustar" or header[345] or header[99]:
                    return _members_of_any_tar(path)
                size = int(header[124:135], 8)
                found.append((header[: header.index(0)].decode(), place + tarfile.BLOCKSIZE, size))
                place += tarfile.BLOCKSIZE + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    except ValueError:  # no numbers or text where they belong, or an empty file
        return _members_of_any_tar(path)
    return found


def _members_of_any_tar(path: Path) -> list[tuple[str, int, int]]:
    try:
        with tarfile.open(path, "r:") as tar:
            return [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    except tarfile.TarError as error:
        raise DataError(f"shard {path} is not a tar file ({error}); copy it again or pack again") from None


def _place(path: Path, key: str, parts: dict[str, tuple[int, int]]) -> tuple[int, int, int, int]:
    image = next((parts[extension] for extension in parts if extension in _IMAGES), None)
    if image is None or "cls" not in parts:
        lacking = "image (jpg or png)" if image is None else "label (cls)"
        raise DataError(f"shard {path}, sample {key}: has no {lacking}, only {', '.join(sorted(parts))}; pack again")
    return (*image, *parts["cls"])
