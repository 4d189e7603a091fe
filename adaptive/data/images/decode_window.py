"""Bytes of an image file to the pixels of a part of it, a tensor; of most JPEGs no more than that part is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from adaptive.data.images.decode import decode_image
from adaptive.data.images.jpeg_header import JpegFrame, plain_jpeg

_END_OF_IMAGE = b"\xff\xd9"
_HEIGHT_OFFSET = 5  # bytes from the start of a frame header to its number of rows


class Window(NamedTuple):
    """A rectangular part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


DrawWindow = Callable[[int, int], Window]  # of an image's height and width


def decode_window(data: bytes, draw: DrawWindow) -> Tensor:
    """Decode an image file and return the window that ``draw`` chooses: RGB, uint8 (3, height, width), a view.

    The pixels are those of `adaptive.data.images.decode.decode_image`, channels last in memory, in half its time for
    most JPEGs: libjpeg-turbo decodes upright grey and colour ones, Pillow all other files and those that libjpeg-turbo
    refuses. Of most JPEGs the rows beneath the window are not decoded.

    Raises:
        ImageError: the image cannot be decoded.
    """
    frame = plain_jpeg(data)
    if frame is None:
        return cut(to_pixels(decode_image(data)), draw)
    window = draw(frame.height, frame.width)
    return cut(_decode_jpeg(data, frame, window.top + window.height), lambda *_: window)


def cut(pixels: Tensor, draw: DrawWindow) -> Tensor:
    """Return the window (3, height, width) that ``draw`` chooses of pixels (3, H, W), a view."""
    top, left, height, width = draw(*pixels.shape[1:])
    return pixels[:, top : top + height, left : left + width]


def resized(window: Tensor, size: Sequence[int] | int, mode: str) -> Tensor:
    """Resample pixels uint8 (3, h, w), by "bilinear" or "bicubic" with antialiasing as Pillow does, up to rounding."""
    # torch has a kernel for contiguous channels-last pixels, which takes half of the time, this copy included.
    window = window[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(window, size=size, mode=mode, antialias=True)[0]


def _decode_jpeg(data: bytes, frame: JpegFrame, rows: int) -> Tensor:
    """Return at least the upper ``rows`` of the image, uint8 (3, H, W), channels last in memory."""
    # Subsampled chroma: one of its rows serves two of pixels, and upsampling blends it with the next one.
    height = rows + 2
    # A file without an end marker was cut off, which a decoder of fewer rows might not notice.
    whole = height >= frame.height or not frame.sequential or data.rfind(_END_OF_IMAGE, frame.offset) < 0
    try:
        if whole:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
        else:
            # A header that states fewer rows makes the decoder stop there; not strict, for it warns of the data left.
            offset = frame.offset + _HEIGHT_OFFSET
            shortened = b"".join((data[:offset], height.to_bytes(2, "big"), data[offset + 2 :]))
            pixels = simplejpeg.decode_jpeg(shortened, "RGB", strict=False)
    except ValueError:
        return to_pixels(decode_image(data))  # decodes what libjpeg-turbo does not, or raises with the reason
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image's pixels, uint8 (3, H, W), channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
