"""The header of a JPEG file, read without Pillow: the image's size, and whether libjpeg-turbo may decode it by itself.

It may where the image needs no rotation and no colour conversion. Opening a file with Pillow takes a fifth of the time
of decoding it, and several times as long as decoding where there is XMP.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

from adaptive.data.images.decode import ORIENTATION, turn_of

# Markers of ITU-T T.81, annex B: start of a file, frame headers, application data 1 and 2, start of a scan.
_START = b"\xff\xd8"
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE := 0xC2)
_APPLICATION_DATA = (0xE1, 0xE2)
_SCAN = 0xDA
_FRAME_BYTES = 10  # of a frame header that are read, more than of any other segment
# How application data begin that may hold an orientation or further images (Exif 2.3; Adobe's XMP; CIPA DC-007).
_EXIF, _XMP, _MULTI_PICTURE = b"Exif\x00\x00", b"http", b"MPF\x00"
# An XMP orientation other than 1. A closing tag is none, unless a digit follows it, which might mislead Pillow.
_XMP_ROTATED = re.compile(rb'tiff:Orientation(?!="1|>1|(?<=/tiff:Orientation)>\D)')
# TIFF 6.0: the byte order; tag, type, count and value of an orientation of 1, a single number of two bytes.
_BYTE_ORDERS = {b"II*\x00": "<", b"MM\x00*": ">"}
_UPRIGHT = (ORIENTATION, 3, 1, 1)


class JpegFrame(NamedTuple):
    """A JPEG's frame header: its offset in the file (bytes), the image's size, and whether rows are coded in sequence.

    In a progressive file they are not: each of its scans refines all rows.
    """

    offset: int
    height: int
    width: int
    sequential: bool


def plain_jpeg(data: bytes) -> JpegFrame | None:
    """Return the frame of a JPEG that needs no rotation or colour conversion, None of any other file.

    It holds a single upright image, grey or in three colours, of a size that `decode_image` accepts. None as well where
    the header is damaged; where its metadata hold more than is parsed here, Pillow decides.
    """
    if not data.startswith(_START):
        return None
    frame, metas = None, []
    for marker, offset, size in _segments(data):
        if marker == _SCAN:
            return frame if frame is None or _are_upright(metas) or _is_plain_for_pillow(data) else None
        if marker in _FRAMES:
            if frame is not None or (frame := _frame(data, offset, marker)) is None:
                return None
        elif marker in _APPLICATION_DATA:
            metas.append(data[offset + 4 : offset + 2 + size])
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's marker, offset and size (without the marker's two bytes) up to the first damaged one."""
    offset = len(_START)
    while offset + _FRAME_BYTES < len(data) and data[offset] == 0xFF:
        marker, size = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4], "big")
        if size < 2 or not 0xC0 <= marker <= 0xFE:
            return
        yield marker, offset, size
        offset += 2 + size


def _frame(data: bytes, offset: int, marker: int) -> JpegFrame | None:
    height, width = struct.unpack_from(">HH", data, offset + 5)
    small = 0 < height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
    if not small or data[offset + 4] != 8 or data[offset + 9] not in (1, 3):
        return None
    return JpegFrame(offset, height, width, marker != _PROGRESSIVE)


def _are_upright(metas: list[bytes]) -> bool:
    # Pillow joins the parts of a long EXIF.
    return sum(meta.startswith(_EXIF[:4]) for meta in metas) <= 1 and all(map(_is_upright, metas))


def _is_upright(meta: bytes) -> bool:
    """Whether application data certainly hold no orientation but upright, and no further images."""
    if meta.startswith(_EXIF):
        return _is_upright_tiff(meta[len(_EXIF) :])
    return not (meta.startswith((_EXIF[:4], _MULTI_PICTURE)) or (meta.startswith(_XMP) and _XMP_ROTATED.search(meta)))


def _is_upright_tiff(tiff: bytes) -> bool:
    """Whether the first directory can be read, and holds no orientation but upright."""
    if (order := _BYTE_ORDERS.get(tiff[:4])) is None:
        return False
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, start)
        entries = [struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * number) for number in range(count)]
    except struct.error:
        return False
    return all(entry == _UPRIGHT for entry in entries if entry[0] == ORIENTATION)


def _is_plain_for_pillow(data: bytes) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=("JPEG",))
            return image.format == "JPEG" and image.mode in ("RGB", "L") and turn_of(image) is None
        except Exception:  # decode_image will say what is wrong
            return False
