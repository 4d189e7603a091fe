"""The test-time transform of an exported network, which its manifest describes, run by Pillow and numpy alone.

It gives what `adaptive.data.images.transforms.eval_transform` gives, without torch, torchvision and timm.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from adaptive.config.sections import DataConfig
from adaptive.data.images.eval_crop import EvalCrop
from adaptive.inference.frozen_model import FrozenModel

Side = Annotated[int, Field(ge=1)]
Channels = Annotated[list[float], Field(min_length=3, max_length=3)]


class Preprocess(FrozenModel):
    """RGB image -> normalised array: resize, keep the centre, scale to 0..1, subtract the mean, divide by std."""

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
        return cls(**EvalCrop.of(data)._asdict(), mean=data.mean, std=data.std)

    def settings(self) -> dict[str, object]:
        """Return the keys of section ``data`` whose test-time transform this is."""
        whole = {"squash": "none", "shorter": "pad"}[self.resize]
        part = self.resize == "shorter" and self.size > self.crop
        return {
            "image_size": self.crop,
            "crop": "resize" if part else whole,
            "eval_crop": self.crop / (self.size + 0.5) if part else 1.0,  # the size is what is left of the fraction
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
        }

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Image of any size, converted to RGB -> float32 (3, crop, crop)."""
        crop = EvalCrop(self.resize, self.size, self.interpolation, self.crop)
        pixels = np.asarray(crop(image.convert("RGB")))
        values = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / np.float32(255)
        mean, std = (np.asarray(part, np.float32)[:, None, None] for part in (self.mean, self.std))
        return (values - mean) / std
