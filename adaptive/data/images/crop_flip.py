"""Pad-and-crop and flip: drawn for all images of an epoch at once, and applied to one image or to a batch of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adaptive.data.images.resizing import ResizedView
from adaptive.data.seeding import CROP

Draws = NDArray[np.float64]
# How crop and flip of data.crop: pad and none are drawn: for all images of an epoch at once, or, as runs of earlier
# versions began and go on, from every image's own generators.
DrawnBy = Literal["epoch", "sample"]


class CropFlipDraws:
    """The draws of crop and flip of every training image: a pure function of seed, epoch and sample id.

    Of an image come three numbers in [0, 1): where its crop lies between top and bottom, and between left and right,
    and one that flips it where it is below the probability. They do not depend on how large images are.

    Args:
        seed: of the run.
        count: number of samples in the split.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count
        self._epoch = -1
        self._table: Draws = np.empty((0, 3))

    def of(self, epoch: int, ids: NDArray[np.int64] | Sequence[int]) -> Draws:
        """Return the draws (n, 3) of these samples in an epoch."""
        if epoch != self._epoch:
            sequence = np.random.SeedSequence([self.seed, epoch], spawn_key=(CROP,))
            self._table = np.random.Generator(np.random.PCG64(sequence)).random((self.count, 3))
            self._epoch = epoch
        return self._table[ids]


def crop_flip_image(
    image: Image.Image | ResizedView, draws: Draws, size: int, padding: int, flip: float
) -> Image.Image:
    """Return a window of size x size pixels of an RGB image with a black border, flipped or not.

    Args:
        image: its sides are at least ``size - 2 * padding`` pixels.
        draws: of this image, shape (3,).
        size: in pixels.
        padding: width of the border in pixels.
        flip: probability of a horizontal flip.
    """
    width, height = image.size
    top = int(draws[0] * (height + 2 * padding - size + 1)) - padding
    left = int(draws[1] * (width + 2 * padding - size + 1)) - padding
    if isinstance(image, ResizedView) or (left, top, width, height) != (0, 0, size, size):
        image = image.crop((left, top, left + size, top + size))  # black beyond the image
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[2] < flip else image


def crop_flip_places(draws: Draws, padding: int, flip: float) -> NDArray[np.int64]:
    """Return where `crop_flip_pixels` crops, and whether it flips, for square images: (n, 3), top, left and 0 or 1."""
    places = (draws * (2 * padding + 1)).astype(np.int64)
    places[:, 2] = draws[:, 2] < flip
    return places


def crop_flip_pixels(pixels: Tensor, places: Tensor, padding: int) -> Tensor:
    """Return what `crop_flip_image` makes of every image of a batch, bit for bit, on any device.

    Args:
        pixels: uint8 (N, S, S, 3).
        places: of `crop_flip_places`, (N, 3) on the same device.
        padding: width of the black border in pixels.
    """
    if padding:
        count, size, _, channels = pixels.shape
        padded = F.pad(pixels, (0, 0, padding, padding, padding, padding))
        image, row, column, _ = padded.stride()
        # All windows of all images as a view; those that were drawn are copied.
        windows = padded.as_strided(
            (count, 2 * padding + 1, 2 * padding + 1, size, size * channels), (image, row, column, row, 1)
        )
        images = torch.arange(count, device=pixels.device)
        pixels = windows[images, places[:, 0], places[:, 1]].view(pixels.shape)
    return torch.where(places[:, 2].bool()[:, None, None, None], pixels.flip(2), pixels)


def crop_flip_bytes(pixels: Tensor, places: NDArray[np.int64], padding: int) -> Tensor:
    """Return what `crop_flip_pixels` returns, for pixels in the host's memory, in a third of the time.

    To numpy a window's row, and a whole image, is one opaque value, which it copies at once; torch copies byte by byte.
    """
    count, size, _, channels = pixels.shape
    padded = F.pad(pixels, (0, 0, padding, padding, padding, padding)).numpy()
    image, row, column, _ = padded.strides
    windows: NDArray[np.void] = np.ndarray(
        (count, 2 * padding + 1, 2 * padding + 1, size),
        np.dtype((np.void, size * channels)),
        padded,
        strides=(image, row, column, row),
    )
    image_bytes = size * size * channels
    cropped = windows[np.arange(count), places[:, 0], places[:, 1]].view(np.dtype((np.void, image_bytes)))
    found = torch.from_numpy(cropped.view(np.uint8)).view(pixels.shape)
    rows = np.flatnonzero(places[:, 2])
    flipped = found.index_select(0, torch.from_numpy(rows)).flip(2)
    cropped[rows] = flipped.numpy().reshape(len(rows), image_bytes).view(cropped.dtype)
    return found
