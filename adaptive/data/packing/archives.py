"""Tar archives read without unpacking: members by offset, also of a tar in a tar, and small files of compressed ones.

Nothing is ever written to disk. Links, devices and sparse members are skipped, names that lead outside are refused.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adaptive.data.shards.tar_headers import BROKEN, HeaderReader, decompressed, members, open_tar
from adaptive.errors import DataError, reason_of

_HEADER = 512
# One header and the byte before it, by which tarfile tests that a member is complete: it uses no more of a buffer.
_BUFFER = 2 * _HEADER
_MAX_DECOMPRESSED = 1 << 30  # bytes; CIFAR has 184 million, the devkit 10
_MAX_MEMBERS = 100_000


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an uncompressed tar: the last part of its name, and offset and size in the outermost file."""

    name: str
    offset: int
    size: int


def list_members(path: Path, inside: Member | None = None) -> tuple[list[Member], list[str]]:
    """Return the regular files of an uncompressed tar, or of a tar that is a member of it, and the names left out.

    Of two files of one name the later one is taken, as in unpacking, and the earlier one left out. Links, devices and
    sparse files are left out.

    Raises:
        DataError: the archive is compressed, cut off or damaged, or a name in it leads outside.
        OSError: the file cannot be read.
    """
    shown = f"{inside.name} in {path}" if inside else str(path)
    with path.open("rb", buffering=0) as file:
        start = inside.offset if inside else 0
        size = inside.size if inside else os.fstat(file.fileno()).st_size
        try:
            part = HeaderReader(io.BufferedReader(_ByteRange(file, start, size), _BUFFER))
            with open_tar(part) as tar:
                found, ignored = _regular(tar, shown)
                end = tar.offset
        except BROKEN as error:
            raise DataError(
                f"{shown} is cut off, damaged or not an uncompressed tar ({error}); download it again"
            ) from None
        # tarfile takes a damaged header for the end of the archive. The true end is a block of zeros.
        file.seek(start + min(end, size))
        mark = file.read(min(_HEADER, size - min(end, size)))
        if mark.strip(b"\0") or not (mark or inside):
            raise DataError(f"{shown} is cut off or damaged at byte {end}; download it again")
    return [Member(name, start + member.offset_data, member.size) for name, member in found.items()], ignored


def read_files(path: Path, wanted: Callable[[str], bool], limit: int) -> tuple[dict[str, bytes], list[str]]:
    """Return the content of the wanted files of a (compressed) tar by the last part of their names, and all names.

    Raises:
        DataError: the archive is cut off or damaged, a name leads outside, or a wanted file has over ``limit`` bytes.
        OSError: the file cannot be read.
    """
    contents, names = {}, []
    try:
        with decompressed(path) as file:
            reader = HeaderReader(file, _MAX_DECOMPRESSED)
            with open_tar(reader) as tar:
                for member in members(tar):
                    names.append(member.name)
                    if len(names) > _MAX_MEMBERS:
                        raise DataError(f"{path} holds over {_MAX_MEMBERS} files, no original archive does")
                    name = _safe_name(member.name, str(path))
                    if not member.isreg() or member.issparse() or not wanted(name):
                        continue
                    if member.size > limit:
                        raise DataError(f"{name} in {path} has {member.size} bytes, over {limit}; download it again")
                    contents[name] = reader.content(member.offset_data, member.size)
                    if len(contents[name]) < member.size:
                        raise tarfile.ReadError("unexpected end of data")
    except BROKEN as error:
        raise DataError(f"{path} is cut off, damaged or not a tar ({reason_of(error)}); download it again") from None
    return contents, names


def _regular(tar: tarfile.TarFile, shown: str) -> tuple[dict[str, tarfile.TarInfo], list[str]]:
    found: dict[str, tarfile.TarInfo] = {}
    ignored = []
    for member in members(tar):
        name = _safe_name(member.name, shown)
        if member.isreg() and not member.issparse():
            if name in found:
                ignored.append(member.name)
            found[name] = member
        elif not member.isdir():
            ignored.append(member.name)
    return found, ignored


def _safe_name(name: str, shown: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        raise DataError(f"{shown} holds {name!r}, no name of an original archive; do not use it, download it again")
    return path.name


class _ByteRange(io.RawIOBase):
    """A range of bytes of an open file, as a file object."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        self._offset = 0

    def readable(self) -> bool:
        """Say yes."""
        return True

    def seekable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Return the offset in the range."""
        return self._offset

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset in the range."""
        self._offset = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self._size}[whence]
        return self._offset

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Read from the offset, at most to the end of the range."""
        count = max(0, min(len(buffer), self._size - self._offset))
        self._file.seek(self._start + self._offset)
        done = self._file.readinto(buffer[:count])
        self._offset += done
        return done
