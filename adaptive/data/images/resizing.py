"""Resizing for a crop, of images of any shape: where an image is long and thin, no more of it than the crop keeps.

A strip of 2,000,000 x 1 pixels whose shorter side becomes 256 would have half a billion. It needs Pillow alone.
"""

from __future__ import annotations

import math

from PIL import Image

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MOST = 128  # times the pixels of the crop to which an image is resized as a whole
_REACH = 2  # pixels of the coarser of both images to which the filters reach, bicubic the furthest

Size = tuple[int, int]  # width and height in pixels
Box = tuple[int, int, int, int]  # left, top, right, bottom


def resized_size(size: Size, side: int, squash: bool) -> Size:
    """Return the size of an image whose shorter side, or with ``squash`` both, become ``side``; as torchvision does."""
    width, height = size
    if squash:
        return side, side
    longer = int(side * max(size) / min(size))
    return (side, longer) if width <= height else (longer, side)


def resized_for(image: Image.Image, size: Size, method: Image.Resampling, crop: int) -> Image.Image | ResizedView:
    """Return an RGB image resized, for a crop of ``crop`` x ``crop`` pixels.

    A result of more than `MOST` times the pixels of the crop is not made: of the view that is returned instead, crops
    are resized by themselves, with the same pixels up to rounding.
    """
    if size[0] * size[1] > MOST * crop * crop:
        return ResizedView(image, size, method)
    return image.resize(size, method)


class ResizedView:
    """An image resized, of which nothing is made but the crops that are asked for.

    Attributes:
        size: width and height in pixels.
    """

    def __init__(self, image: Image.Image, size: Size, method: Image.Resampling) -> None:
        self.size = size
        self._image, self._method = image, method

    def crop(self, box: Box) -> Image.Image:
        """Return a part of the resized image; beyond its edges it is black, as with Pillow's crop."""
        left, top, right, bottom = box
        width, height = self.size
        inside = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        if inside == box:
            return self._part(inside)
        cropped = Image.new(self._image.mode, (right - left, bottom - top))
        if inside[0] < inside[2] and inside[1] < inside[3]:
            cropped.paste(self._part(inside), (inside[0] - left, inside[1] - top))
        return cropped

    def _part(self, box: Box) -> Image.Image:
        left, right, begin_x, end_x = _source(box[0], box[2], self.size[0], self._image.width)
        top, bottom, begin_y, end_y = _source(box[1], box[3], self.size[1], self._image.height)
        # Pillow takes a box of single precision: from the left edge of a long strip it would be off by pixels.
        piece = self._image.crop((begin_x, begin_y, end_x, end_y))
        found = (left - begin_x, top - begin_y, right - begin_x, bottom - begin_y)
        return piece.resize((box[2] - box[0], box[3] - box[1]), self._method, box=found)


def _source(first: int, last: int, resized: int, original: int) -> tuple[float, float, int, int]:
    """Return where pixels [first, last) of a resized side come from, and the pixels that the filter looks at."""
    scale = original / resized
    begin, end = first * scale, min(last * scale, original)
    reach = _REACH * max(scale, 1) + 1
    return begin, end, max(0, math.floor(begin - reach)), min(original, math.ceil(end + reach))
