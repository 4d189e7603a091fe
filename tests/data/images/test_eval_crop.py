"""What evaluation looks at, against timm's own transform, pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from adaptive.config.sections import DataConfig
from adaptive.data.images.transforms import eval_transform

# Width and height: landscape, portrait, odd, smaller than the crop in one or both directions, extreme, the very size.
SIZES = [(97, 64), (64, 97), (33, 33), (20, 51), (7, 5), (1, 1), (3, 200), (301, 40), (45, 45), (51, 51), (600, 449)]
MODES = {"resize": "center", "pad": "center", "none": "squash"}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("crop", list(MODES))
@pytest.mark.parametrize(("image_size", "eval_crop"), [(32, 0.875), (45, 0.9), (33, 1.0)])
@pytest.mark.parametrize("normalize", [True, False])
def test_it_is_timms(interpolation: str, crop: str, image_size: int, eval_crop: float, normalize: bool) -> None:
    values = {"interpolation": interpolation, "crop": crop, "image_size": image_size, "eval_crop": eval_crop}
    data = DataConfig.model_validate({"path": "x", **values})
    theirs = create_transform(
        image_size,
        is_training=False,
        interpolation="bicubic" if interpolation == "random" else interpolation,
        mean=tuple(data.mean),
        std=tuple(data.std),
        crop_pct=eval_crop if crop == "resize" else 1.0,
        crop_mode=MODES[crop],
        normalize=normalize,
    )
    ours = eval_transform(data, normalize)
    for width, height in SIZES:
        pixels = np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        found, expected = ours(image), theirs(image)
        assert (found.dtype, found.shape) == (expected.dtype, (3, image_size, image_size))
        assert torch.equal(found, expected)
