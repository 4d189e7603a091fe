"""Decoding: bytes of an image file to an upright 8-bit RGB image, by Pillow."""

from __future__ import annotations

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from adaptive.errors import DataError, reason_of

# Only raster formats that Pillow decodes by itself: EPS, for one, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

# Modes whose files are packed unchanged: any decoder makes the same pixels of them.
_PLAIN_MODES = {"JPEG": {"RGB", "L"}, "MPO": {"RGB", "L"}, "PNG": {"RGB", "L", "P"}}
ORIENTATION = 0x0112  # the EXIF tag


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
    """Decode as `decode_image` does, and return format and plainness of the file as well (raises ImageError)."""
    if not data:
        raise ImageError("the file is empty")
    with warnings.catch_warnings():
        # Broken metadata is no concern of ours; an image beyond Pillow's size limit is.
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return _decode(data)
        except ImageError:
            raise
        except UnidentifiedImageError:
            raise ImageError("not an image, or of a kind that is not read") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise ImageError(f"more than {Image.MAX_IMAGE_PIXELS} pixels: possibly a decompression bomb") from None
        except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
            raise ImageError(reason_of(error)) from None


def _decode(data: bytes) -> DecodedImage:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    kind = image.format or ""
    # An MPO file is a photograph with a second view behind it; the others are animations or several pages.
    if kind != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise ImageError(f"{kind} with {getattr(image, 'n_frames', 1)} frames; only single images are taken")
    image.load()
    turned = orientation(image) not in (None, 1)
    # Pillow reads 16-bit colour PNGs as 8-bit RGB; the file itself still holds 16 (byte 24 is IHDR's bit depth).
    deep = image.mode.startswith(("I", "F")) or (kind == "PNG" and data[24] == 16)
    plain = image.mode in _PLAIN_MODES.get(kind, ()) and not turned and not deep
    if turned:
        image = ImageOps.exif_transpose(image)
    return DecodedImage(_to_rgb(image, kind), kind, plain)


def orientation(image: Image.Image) -> int | None:
    """Return the orientation in the image's EXIF, 1 for upright; None where there is none or it cannot be read."""
    try:
        return image.getexif().get(ORIENTATION)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error):
        return None  # unreadable EXIF: the pixels are still good


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
    # 65535 / 255 = 257: white stays white, where Pillow's own conversion clips at 255.
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
