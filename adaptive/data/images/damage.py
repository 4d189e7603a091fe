"""Damage of which a decoder says nothing: image files that decode though a part of the image is lost.

Pillow keeps libjpeg's warnings to itself: of a JPEG whose second half was overwritten it returns grey rows. Training
reads such images as Pillow does; packing and verifying look closer, once at every image.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import simplejpeg  # type: ignore[import-untyped]
from PIL import Image

from adaptive.data.images.decode import ImageError, decode
from adaptive.data.images.jpeg_header import plain_jpeg

# Warnings of libjpeg (jerror.h) after which pixels are made up.
_LOST = re.compile(r"premature end|bad huffman code|found marker 0x|bad arithmetic code", re.IGNORECASE)
# Cameras fill up the data of an image as well, but not with a good part of the file.
_UNUSED = re.compile(r"([0-9]+) extraneous bytes before marker")
_MUCH = 64  # one byte of so many
_ZEROS = 64  # bytes: compressed data end with fewer


class DamagedImage(ImageError):  # noqa: N818 - a kind of ImageError
    """An image file decodes, but a part of the image is lost."""


class CheckedImage(NamedTuple):
    """A whole image: its size, format, and whether its file can be packed unchanged.

    ``image`` is what Pillow decoded, None where libjpeg-turbo did that; ``suspicion`` is what the decoder wondered at.
    """

    width: int
    height: int
    format: str
    plain: bool
    image: Image.Image | None = None
    suspicion: str = ""


def check_image(data: bytes) -> CheckedImage:
    """Decode an image file and check that all of it is there.

    Raises:
        DamagedImage: a part of the image is lost.
        ImageError: it cannot be decoded.
    """
    frame = plain_jpeg(data)
    if frame is not None and not (warning := _warning(data, "RGB")):
        return CheckedImage(frame.width, frame.height, "JPEG", True)
    decoded = decode(data)
    if frame is None:
        warning = _warning(data, "") if decoded.format in ("JPEG", "MPO") else ""
    if lost := _lost(data, decoded.format, warning):
        raise DamagedImage(f"damaged, a part of the image is lost ({lost})")
    suspicion = warning if _UNUSED.search(warning) else ""
    return CheckedImage(*decoded.image.size, decoded.format, decoded.plain, decoded.image, suspicion)


def _warning(data: bytes, colours: str) -> str:
    """Return what libjpeg-turbo has to say of a JPEG, mostly nothing; its colour space is looked up where not given."""
    try:
        if not colours:
            colours = "CMYK" if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK") else "RGB"
        simplejpeg.decode_jpeg(data, colours)
    except ValueError as error:
        return str(error) or "refused"
    return ""


def _lost(data: bytes, kind: str, warning: str) -> str:
    if _LOST.search(warning):
        return warning
    unused = _UNUSED.search(warning)
    if unused and int(unused[1]) * _MUCH > len(data):
        return warning
    if kind == "WEBP":
        body = data[: 8 + int.from_bytes(data[4:8], "little")]
        zeros = len(body) - len(body.rstrip(b"\0"))
        if zeros > max(_ZEROS, len(body) // _MUCH):
            return f"its last {zeros} bytes are zeros"
    return ""
