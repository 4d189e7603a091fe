"""Damage of which a decoder says nothing: image files that decode though a part of the image is lost.

Pillow keeps libjpeg's warnings to itself: of a JPEG whose second half was overwritten it returns grey rows. Training
reads such images as Pillow does; packing and verifying look closer, once at every image.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
from numpy.typing import NDArray
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
    """A whole image, upright and in RGB, its file's format, and whether this can be packed unchanged.

    ``suspicion`` is what the decoder wondered at, mostly nothing.
    """

    image: Image.Image
    format: str
    plain: bool
    suspicion: str = ""


def check_image(data: bytes) -> CheckedImage:
    """Decode an image file and check that all of it is there.

    libjpeg-turbo decodes upright grey and colour JPEGs, as for `adaptive.data.images.decode_window`, with the pixels
    of Pillow in half of its time.

    Raises:
        DamagedImage: a part of the image is lost.
        ImageError: it cannot be decoded.
    """
    frame, warning = plain_jpeg(data), ""
    if frame is not None:
        pixels, warning = _decode_jpeg(data, "RGB")
        if pixels is not None:
            return CheckedImage(Image.fromarray(pixels), "JPEG", True)
    decoded = decode(data)
    if frame is None and decoded.format in ("JPEG", "MPO"):
        _, warning = _decode_jpeg(data, "")
    if lost := _lost(data, decoded.format, warning):
        raise DamagedImage(f"damaged, a part of the image is lost ({lost})")
    suspicion = warning if _UNUSED.search(warning) else ""
    return CheckedImage(decoded.image, decoded.format, decoded.plain, suspicion)


def _decode_jpeg(data: bytes, colours: str) -> tuple[NDArray[np.uint8] | None, str]:
    """Return a JPEG's pixels, or else what libjpeg-turbo has to say of it; colours that are not given are looked up."""
    try:
        if not colours:
            colours = "CMYK" if simplejpeg.decode_jpeg_header(data)[2] in ("CMYK", "YCCK") else "RGB"
        return simplejpeg.decode_jpeg(data, colours), ""
    except ValueError as error:
        return None, str(error)


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
