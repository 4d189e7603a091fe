"""Image files without their metadata, for those whose texts, profiles or application data a decoder refuses.

Pillow bounds the texts of a PNG (those of image generators go beyond it), and takes a JPEG with a short colour profile
for no image at all, though in both cases the pixels are whole.
"""

from __future__ import annotations

import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8"
# PNG's chunks (ISO/IEC 15948) that RGB pixels depend on, how many images there are, and which way is up.
_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"eXIf"}
_EXIF_CHUNK = b"eXIf"
# Markers of ITU-T T.81, annex B: comments and application data, from 0 to 15, and the start of a scan.
_COMMENT, _SCAN = 0xFE, 0xDA
_APPLICATION_DATA = range(0xE0, 0xF0)
# Application data that pixels or their orientation depend on, and the bytes that they have at least.
_NEEDED = {0xE1: (b"Exif\x00\x00", 6), 0xEE: (b"Adobe", 12)}


def without_metadata(data: bytes) -> bytes | None:
    """Return a PNG or JPEG file with the same pixels and orientation, but without texts, profiles and the like.

    None where there are none, and for all other files. It takes no more memory than the file.
    """
    pieces = _of_png(data) if data.startswith(_PNG) else _of_jpeg(data) if data.startswith(_JPEG) else None
    kept = b"".join(pieces) if pieces else b""
    return kept if 0 < len(kept) < len(data) else None


def _of_png(data: bytes) -> list[memoryview]:
    whole, offset = memoryview(data), len(_PNG)
    pieces = [whole[:offset]]
    while offset + 12 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 12 + size
        chunk = whole[offset:end]
        if kind in _CHUNKS and (kind != _EXIF_CHUNK or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")):
            pieces.append(chunk)
        offset = end
    return pieces


def _of_jpeg(data: bytes) -> list[memoryview]:
    whole, offset = memoryview(data), len(_JPEG)
    pieces = [whole[:offset]]
    while offset + 4 <= len(data) and data[offset] == 0xFF and data[offset + 1] != _SCAN:
        marker, size = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4], "big")
        segment = whole[offset : offset + 2 + size]
        start, least = _NEEDED.get(marker, (b"", 0))
        meta = marker == _COMMENT or marker in _APPLICATION_DATA
        if not meta or (start and size - 2 >= least and segment[4 : 4 + len(start)] == start):
            pieces.append(segment)
        offset += 2 + size
    return [*pieces, whole[offset:]]
