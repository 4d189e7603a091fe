"""The crop that evaluation and exported networks look at: resize an image, keep the square in its middle.

It needs Pillow alone, so that an exported network runs it without torch, torchvision and timm.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from PIL import Image

from adaptive.config.sections import DataConfig
from adaptive.data.images.resizing import FILTERS, resized_for, resized_size


class EvalCrop(NamedTuple):
    """RGB image of any size -> RGB image of ``crop`` x ``crop`` pixels.

    Attributes:
        resize: ``shorter`` brings the shorter side to ``size`` and keeps the shape, ``squash`` brings both to it.
        size: in pixels, at least ``crop``.
        interpolation: how the image is resized.
        crop: side of the square in the middle that is kept, in pixels.
    """

    resize: Literal["shorter", "squash"]
    size: int
    interpolation: Literal["bilinear", "bicubic"]
    crop: int

    @classmethod
    def of(cls, data: DataConfig) -> EvalCrop:
        """``crop: resize`` takes the middle ``eval_crop`` of the shorter side; ``pad`` and ``none`` take all of it."""
        share = data.eval_crop if data.crop == "resize" else 1.0
        return cls(
            resize="squash" if data.crop == "none" else "shorter",
            size=math.floor(data.image_size / share),
            interpolation="bicubic" if data.interpolation == "random" else data.interpolation,
            crop=data.image_size,
        )

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resize, and keep the middle."""
        size = resized_size(image.size, self.size, self.resize == "squash")
        resized = resized_for(image, size, FILTERS[self.interpolation], self.crop)
        # Python's round, half to even, is torchvision's choice of the middle.
        left, top = (round((side - self.crop) / 2) for side in resized.size)
        return resized.crop((left, top, left + self.crop, top + self.crop))
