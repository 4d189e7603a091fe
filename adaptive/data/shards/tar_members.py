"""The regular files of a tar, by a scan of its headers: fast for the plain ones that most writers make."""

from __future__ import annotations

import errno
import mmap
import os
import tarfile

from adaptive.data.faults import MEMBER, BadDataError
from adaptive.data.shards.tar_headers import BROKEN, LONGEST_HEADER, HeaderReader, members, open_tar

Member = tuple[str, int, int]  # name, and offset and size of the data in bytes

_BLOCK = tarfile.BLOCKSIZE
_PATH = b"path"
# What an extended header may say of a member without changing where its data lie (POSIX pax). WebDataset's own
# writer, like Python's tarfile for any time that is no whole number, puts one with the time before every member.
_HARMLESS = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}


def members_of(shown: str, descriptor: int) -> list[Member]:
    """Return name, offset of the data and size in bytes of every regular file in a tar.

    Every worker scans every shard, and tarfile takes ten times as long as the fields need: they are parsed here, and
    tarfile is used for archives with other headers than plain ones (GNU's long names, links, sparse files).

    Raises:
        BadDataError: it is no tar.
        OSError: it cannot be read.
    """
    found = []
    try:
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as content:
            offset, path = 0, ""
            while (header := content[offset : offset + _BLOCK]).strip(b"\0"):
                kind, data = header[156:157], offset + _BLOCK
                size = int(header[124:135], 8)
                if header[257:262] != b"ustar" or size < 0 or data + size > len(content):
                    return _members_of_any_tar(shown, descriptor)
                if kind == tarfile.XHDTYPE and not path and size <= LONGEST_HEADER:
                    path = _path_of(content[data : data + size])
                elif kind == tarfile.REGTYPE and (path or not (header[345] or header[99])):
                    found.append((path or header[: header.index(0)].decode(), data, size))
                    path = ""
                else:
                    return _members_of_any_tar(shown, descriptor)
                offset = data + -(-size // _BLOCK) * _BLOCK
    except (ValueError, IndexError):  # no numbers or text where they belong, cut off, or an empty file
        return _members_of_any_tar(shown, descriptor)
    return found


def _path_of(extended: bytes) -> str:
    """Return the path that an extended header gives its member, empty for none (ValueError: it says more than that)."""
    path, start = "", 0
    while start < len(extended):
        space = extended.index(b" ", start)
        end = start + int(extended[start:space])
        key, equals, value = extended[space + 1 : end - 1].partition(b"=")
        if end <= space or not extended[start:space].isdigit() or extended[end - 1 : end] != b"\n" or not equals:
            raise ValueError("no record of a header")
        if key == _PATH and value and not value.endswith(b"/"):
            path = value.decode()
        elif key not in _HARMLESS:
            raise ValueError("a header of another kind")
        start = end
    return path


def _members_of_any_tar(shown: str, descriptor: int) -> list[Member]:
    """Do the same for any tar; sparse files are skipped, a truncated one is listed with one byte more than it has."""
    end = os.fstat(descriptor).st_size
    found = []
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            with open_tar(HeaderReader(file)) as tar:
                for member in members(tar):
                    if member.isreg() and not member.issparse():
                        found.append((member.name, member.offset_data, min(member.size, end - member.offset_data + 1)))
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.EOVERFLOW):
            raise
        message = f"shard {shown} is not a tar file ({error}); copy it again or pack again"
        raise BadDataError(message, MEMBER, whole=True) from None
    return found
