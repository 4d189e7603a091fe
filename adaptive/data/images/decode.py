"""Decoding: bytes of an image file to an upright 8-bit RGB image, by Pillow."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from adaptive.data.images.metadata import without_metadata
from adaptive.errors import DataError, reason_of

# Only raster formats that Pillow decodes by itself: EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

# Modes whose files are packed unchanged: any decoder makes the same pixels of them.
_PLAIN_MODES = {"JPEG": {"RGB", "L"}, "MPO": {"RGB", "L"}, "PNG": {"RGB", "L", "P"}}
ORIENTATION = 0x0112  # the EXIF tag
# What turns an image upright, by its orientation (Exif 2.3); 1 is upright, other numbers mean nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BAND = 1 << 20  # pixels of 16 bits that are scaled at a time


class ImageError(DataError):
    """An image cannot be decoded; the message is the reason."""


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB image, its file's format, and whether the file can be packed unchanged (``plain``)."""

    image: Image.Image
    format: str
    plain: bool


def decode_image(data: bytes) -> Image.Image:
    """Return an image file's content as RGB, 8 bits per channel, rotated upright (raises ImageError).

    Grey and palette images are expanded, alpha is dropped as torchvision does, CMYK is converted, 16 bits are scaled
    to 8.
    """
    return decode(data).image


def decode(data: bytes) -> DecodedImage:
    """Decode as `decode_image` does, and return format and plainness of the file as well (raises ImageError).

    Metadata are no reason to refuse an image: a file that is refused is tried without them.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        return _decode(data)
    except ImageError:
        bare = without_metadata(data)
        if bare is None:
            raise
    found = _decode(bare)
    # Other readers of a shard may refuse such a PNG as well; a JPEG would lose by being encoded again.
    return replace(found, plain=found.plain and found.format != "PNG")


def _decode(data: bytes) -> DecodedImage:
    with warnings.catch_warnings():
        # Broken metadata is no concern of ours; an image beyond Pillow's size limit is.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _decode_unguarded(data)
        except ImageError:
            raise
        except UnidentifiedImageError:
            raise ImageError("not an image, or of a kind that is not read") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels: possibly a decompression bomb") from None
        except MemoryError:
            raise ImageError("there is not enough memory for its pixels") from None
        except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
            raise ImageError(reason_of(error)) from None


def _decode_unguarded(data: bytes) -> DecodedImage:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    kind = image.format or ""
    # An MPO file is a photograph with a second view behind it; the others are animations or several pages.
    if kind != "MPO" and _has_frames(image):
        raise ImageError(f"{kind} with several frames; only single images are taken")
    image.load()
    turn = turn_of(image)
    # Pillow reads 16-bit colour PNGs as 8-bit RGB; the file itself still holds 16 (byte 24 is IHDR's bit depth).
    deep = image.mode.startswith(("I", "F")) or (kind == "PNG" and data[24] == 16)
    plain = image.mode in _PLAIN_MODES.get(kind, ()) and turn is None and not deep
    # Not by ImageOps.exif_transpose, which writes the rest of the EXIF anew, and fails where that is garbage.
    upright = image if turn is None else image.transpose(turn)
    return DecodedImage(_to_rgb(upright, kind), kind, plain)


def _has_frames(image: Image.Image) -> bool:
    # Counting them all takes quadratic time in a TIFF.
    several: bool = getattr(image, "is_animated", None) or getattr(image, "n_frames", 1) > 1
    return several


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """Return what turns an image upright by its EXIF; None where it is, or its EXIF says nothing that can be read."""
    try:
        return _TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # on garbage Pillow's parser raises nearly anything, and the pixels are still good
        return None


def _to_rgb(image: Image.Image, kind: str) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    elif image.mode == "F":
        raise ImageError("floating-point pixels have no defined range")
    elif image.mode == "CMYK" and kind == "JPEG" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for an Adobe one, which stores its inks inverted.
        image = ImageChops.invert(image)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ImageError(f"32-bit pixels ({low}..{high}) have no defined range")
    scaled = np.empty(values.shape, np.uint8)
    rows = max(1, _BAND // values.shape[1])
    for start in range(0, len(values), rows):  # in bands: all at once would take ten times the memory
        # 65535 / 255 = 257: white stays white, where Pillow's own conversion clips at 255.
        scaled[start : start + rows] = (values[start : start + rows].astype(np.uint32) + 128) // 257
    return Image.fromarray(scaled)
