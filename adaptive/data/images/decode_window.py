"""Images as tensors of pixels: decoded from a file's bytes, and a batch of them normalised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg  # type: ignore[import-untyped]
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from adaptive.data.images.decode import decode_image
from adaptive.data.images.jpeg_header import JpegFrame, plain_jpeg

_END = b"\xff\xd9"
_HEIGHT = 5  # of a frame's header: where it says how many rows there are


class Window(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


Draw = Callable[[int, int], Window]


def decode_window(data: bytes, draw: Draw) -> Tensor:
    """Return the window that ``draw`` chooses for the image's height and width: RGB, uint8 (3, height, width), a view.

    The pixels are those of `adaptive.data.images.decode.decode_image`, channels innermost in memory, in half its time
    for most JPEGs: libjpeg-turbo takes upright grey and colour ones by itself, Pillow all else, and whatever
    libjpeg-turbo has a doubt about. Of most JPEGs the rows beneath the window are not decoded.

    Raises:
        ImageError: the image cannot be decoded.
    """
    frame = plain_jpeg(data)
    if frame is None:
        return cut(to_pixels(decode_image(data)), draw)
    window = draw(frame.height, frame.width)
    return cut(_decode_jpeg(data, frame, window.top + window.height), lambda *_: window)


def cut(pixels: Tensor, draw: Draw) -> Tensor:
    """Return the window (3, height, width) that ``draw`` chooses of pixels (3, H, W), a view."""
    top, left, height, width = draw(*pixels.shape[1:])
    return pixels[:, top : top + height, left : left + width]


def _decode_jpeg(data: bytes, frame: JpegFrame, rows: int) -> Tensor:
    """Return at least the upper ``rows`` of the image, uint8 (3, H, W), channels innermost in memory."""
    # A row of colours belongs to two of pixels, and is blended with the one beneath.
    height = rows + 2
    # Without its end the file was cut off, which a decoder of fewer rows might not notice.
    whole = height >= frame.height or not frame.sequential or data.rfind(_END, frame.place) < 0
    try:
        if whole:
            pixels = simplejpeg.decode_jpeg(data, "RGB")
        else:
            # What a decoder does not know of it need not decode; it passes over the rest, of which it complains.
            place = frame.place + _HEIGHT
            less = b"".join((data[:place], height.to_bytes(2, "big"), data[place + 2 :]))
            pixels = simplejpeg.decode_jpeg(less, "RGB", strict=False)
    except ValueError:
        return to_pixels(decode_image(data))  # or it says what is wrong
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image's pixels, uint8 (3, H, W), channels innermost in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def stack_pixels(images: Sequence[Tensor]) -> Tensor:
    """Return uint8 images (3, H, W) as one batch (N, 3, H, W), channels innermost in memory as decoders leave them.

    Copying each as it lies takes a seventh of the time of turning it over, which is left to the device. In a worker the
    batch is made in shared memory at once, as default_collate does: handing it over copies nothing.
    """
    batch: Tensor = default_collate([image.permute(1, 2, 0) for image in images])
    return batch.permute(0, 3, 1, 2)


class Normalize:
    """Brings pixels to zero mean and unit deviation, as torchvision's ToTensor and Normalize do, bit for bit on CPU.

    Args:
        mean, std: of each channel, in units of the largest value, 255.
        device: where the pixels will lie; the constants wait there, so that no batch has to wait for them.
        layout: memory format of what it returns.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.layout = layout
        self._mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1).to(device)
        self._std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1).to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return float32 (N, 3, H, W) for uint8 (N, 3, H, W)."""
        return pixels.to(torch.float32, memory_format=self.layout).div_(255).sub_(self._mean).div_(self._std)
