"""The test-time transform as a description that travels with an exported network, run by Pillow and numpy alone.

It gives what `adaptive.data.images.transforms.eval_transform` gives, without torch, torchvision and timm.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from adaptive.config.sections import DataConfig

Side = Annotated[int, Field(ge=1)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


class Preprocess(BaseModel):
    """RGB image -> normalised array: resize, keep the centre, scale to 0..1, subtract the mean, divide by std."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    resize: Literal["shorter", "squash"]
    """``shorter`` brings the shorter side to `size` and keeps the shape, ``squash`` brings both sides to it."""
    size: Side
    """In pixels."""
    interpolation: Literal["bilinear", "bicubic"]
    crop: Side
    """Side of the square in the middle that is kept, in pixels; at most `size`."""
    mean: Channels
    """Of red, green, blue, for values from 0 to 1."""
    std: Channels

    @classmethod
    def of(cls, data: DataConfig) -> Preprocess:
        """Describe ``eval_transform(data)``."""
        share = data.eval_crop if data.crop == "resize" else 1.0
        return cls(
            resize="squash" if data.crop == "none" else "shorter",
            size=math.floor(data.image_size / share),
            interpolation="bicubic" if data.interpolation == "random" else data.interpolation,
            crop=data.image_size,
            mean=data.mean,
            std=data.std,
        )

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Image of any size, converted to RGB -> float32 (3, crop, crop)."""
        method = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        resized = image.convert("RGB").resize(self._resized(*image.size), method)
        # Python's round, half to even, is torchvision's choice of the middle.
        left, top = (round((side - self.crop) / 2) for side in resized.size)
        pixels = np.asarray(resized.crop((left, top, left + self.crop, top + self.crop)))
        values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)
        mean, std = (np.asarray(part, np.float32)[:, None, None] for part in (self.mean, self.std))
        return (values - mean) / std

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.resize == "squash":
            return self.size, self.size
        longer = int(self.size * max(width, height) / min(width, height))
        return (self.size, longer) if width <= height else (longer, self.size)
