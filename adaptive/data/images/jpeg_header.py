"""The header of a JPEG file, where a decoder without Pillow can take it: the size, and that the picture is upright.

Opening a file with Pillow takes as long as decoding a fifth of it, and several times the decoding where there is XMP.
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

from adaptive.data.images.decode import ORIENTATION, orientation

# The start of a file, markers of a frame's header, of application data 1 and 2, and of a scan, and how those data begin
# that may hold an orientation or further pictures (ITU-T T.81, annex B; Exif 2.3; Adobe's XMP; CIPA DC-007).
_START = b"\xff\xd8"
_LEAST = 10  # bytes of a frame's header, the longest that is looked into without its size
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE := 0xC2)
_META = (0xE1, 0xE2)
_SCAN = 0xDA
_EXIF, _XMP, _PICTURES = b"Exif\x00\x00", b"http", b"MPF\x00"
# Anything but an upright one, and a closing tag (unless a digit follows it, by which Pillow might be misled).
_TURNED = re.compile(rb'tiff:Orientation(?!="1|>1|(?<=/tiff:Orientation)>\D)')
# TIFF 6.0: the byte order; tag, type, count and value of an orientation of 1, a single number of two bytes.
_ORDERS = {b"II*\x00": "<", b"MM\x00*": ">"}
_UPRIGHT = (ORIENTATION, 3, 1, 1)


class JpegFrame(NamedTuple):
    """What a frame header says: where it begins, the image's size, and whether its rows come one after another.

    In a progressive file they do not: each of its scans makes all rows a little better.
    """

    place: int
    height: int
    width: int
    sequential: bool


def plain_jpeg(data: bytes) -> JpegFrame | None:
    """Return the frame of a single upright JPEG, grey or in three colours, of a size `decode_image` accepts, or None.

    Where the header is damaged there is none; where it may say more about the picture than is read here, Pillow is
    asked.
    """
    if not data.startswith(_START):
        return None
    frame, metas = None, []
    for marker, place, size in _segments(data):
        if marker == _SCAN:
            return frame if frame is None or _are_upright(metas) or _is_plain_for_pillow(data) else None
        if marker in _FRAMES:
            if frame is not None or (frame := _frame(data, place, marker)) is None:
                return None
        elif marker in _META:
            metas.append(data[place + 4 : place + 2 + size])
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's marker, place and size (without the marker's two bytes) up to the first that is damaged."""
    place = len(_START)
    while place + _LEAST < len(data) and data[place] == 0xFF:
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if size < 2 or not 0xC0 <= marker <= 0xFE:
            return
        yield marker, place, size
        place += 2 + size


def _frame(data: bytes, place: int, marker: int) -> JpegFrame | None:
    height, width = struct.unpack_from(">HH", data, place + 5)
    small = 0 < height * width <= (Image.MAX_IMAGE_PIXELS or math.inf)
    if not small or data[place + 4] != 8 or data[place + 9] not in (1, 3):
        return None
    return JpegFrame(place, height, width, marker != _PROGRESSIVE)


def _are_upright(metas: list[bytes]) -> bool:
    # Pillow joins the parts of a long EXIF.
    return sum(meta.startswith(_EXIF[:4]) for meta in metas) <= 1 and all(map(_is_upright, metas))


def _is_upright(meta: bytes) -> bool:
    """Whether application data surely tell of no orientation but upright, and of no further pictures."""
    if meta.startswith(_EXIF):
        return _is_upright_tiff(meta[len(_EXIF) :])
    return not (meta.startswith((_EXIF[:4], _PICTURES)) or (meta.startswith(_XMP) and _TURNED.search(meta)))


def _is_upright_tiff(tiff: bytes) -> bool:
    """Whether the first directory can be read, and holds no orientation but upright."""
    if (order := _ORDERS.get(tiff[:4])) is None:
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
            return image.format == "JPEG" and image.mode in ("RGB", "L") and orientation(image) in (None, 1)
        except Exception:  # decode_image has the words for it
            return False
