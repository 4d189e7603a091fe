"""Untrusted tar files: tarfile's parsing of headers, within bounds.

tarfile believes what a header says: a negative size makes it loop for ever, and an extended header of many gigabytes is
read into memory. Nothing is ever extracted.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LONGEST_HEADER = 1 << 20  # bytes of one extended header; names are of some hundred
_FURTHEST = 1 << 60  # bytes: beyond that no file system reaches
_COMPRESSED = {b"\x1f\x8b": gzip.GzipFile, b"BZ": bz2.BZ2File, b"\xfd7": lzma.LZMAFile}
BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class HeaderReader:
    """A file for tarfile to read headers from, each of bounded size.

    ``limit`` bounds the offset that is reached, in bytes: to get further, a decompression bomb would be unpacked.
    """

    def __init__(self, file: IO[bytes] | Any, limit: int = _FURTHEST) -> None:
        self._file, self._limit = file, limit

    def read(self, size: int) -> bytes:
        """Return that many bytes (raises tarfile.ReadError: too many at a time)."""
        if not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self._check(self._file.tell() + size)
        return self._file.read(size)

    def seek(self, offset: int) -> int:
        """Move to an offset from the beginning."""
        if offset < 0:
            raise tarfile.ReadError("a header points backwards")
        self._check(offset)
        return self._file.seek(offset)

    def tell(self) -> int:
        """Return the offset."""
        return self._file.tell()

    def content(self, offset: int, size: int) -> bytes:
        """Return the bytes of a member, whose size the caller has bounded."""
        self._check(offset + size)
        self._file.seek(offset)
        return self._file.read(size)

    def _check(self, offset: int) -> None:
        if offset > self._limit:
            raise tarfile.ReadError(f"more than {self._limit} bytes once decompressed")


def open_tar(file: HeaderReader) -> tarfile.TarFile:
    """Open an uncompressed tar, whose first header is read (raises tarfile.TarError, also where that is hostile)."""
    try:
        return tarfile.open(fileobj=file, mode="r:")  # type: ignore[call-overload]
    except (OSError, *BROKEN):
        raise
    except Exception as error:  # as in `members`
        raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar, each once.

    Raises:
        tarfile.TarError: a header is damaged or hostile.
    """
    last = -1
    iterator = iter(tar)
    while True:
        try:
            member = next(iterator, None)
        except (OSError, *BROKEN):
            raise
        except Exception as error:  # on hostile headers tarfile raises nearly anything
            raise tarfile.ReadError(f"{type(error).__name__}: {error}") from None
        if member is None:
            return
        if member.size < 0 or member.offset <= last:
            raise tarfile.ReadError("a header points backwards")
        last = member.offset
        yield member


@contextmanager
def decompressed(path: Path) -> Iterator[IO[bytes] | Any]:
    """Open a file, decompressing gzip, bzip2 and xz."""
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(0)
        kind = _COMPRESSED.get(start)
        if kind is None:
            yield file
            return
        with kind(fileobj=file) if kind is gzip.GzipFile else kind(file) as content:
            yield content
