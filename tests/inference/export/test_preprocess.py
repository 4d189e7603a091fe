"""The torch-free transform against torchvision's and timm's, pixel by pixel."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from adaptive.config.sections import DataConfig
from adaptive.data.images.transforms import eval_transform
from adaptive.inference.export.preprocess import Preprocess

# Width and height: landscape, portrait, odd, smaller than the crop in one or both directions, extreme, the very size.
SIZES = [(97, 64), (64, 97), (33, 33), (20, 51), (7, 5), (1, 1), (3, 200), (301, 40), (45, 45), (51, 51), (600, 449)]


def photo(width: int, height: int) -> Image.Image:
    generator = np.random.default_rng([width, height])
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def settings(**values: object) -> DataConfig:
    return DataConfig.model_validate({"path": "x", **values})


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("crop", ["resize", "pad", "none"])
@pytest.mark.parametrize(("image_size", "eval_crop"), [(32, 0.875), (45, 0.9), (33, 1.0)])
def test_it_is_the_evaluation_transform(interpolation: str, crop: str, image_size: int, eval_crop: float) -> None:
    data = settings(interpolation=interpolation, crop=crop, image_size=image_size, eval_crop=eval_crop)
    ours, theirs = Preprocess.of(data), eval_transform(data)
    assert Preprocess.model_validate_json(ours.model_dump_json()) == ours
    for width, height in SIZES:
        image = photo(width, height)
        found = ours(image)
        assert (found.dtype, found.shape) == (np.float32, (3, image_size, image_size))
        np.testing.assert_array_equal(found, theirs(image).numpy())


def test_other_means_and_larger_images() -> None:
    data = settings(mean=[0.5, 0.1, 0.77], std=[0.3, 0.001, 2.0], image_size=224)
    image = photo(500, 375)
    np.testing.assert_array_equal(Preprocess.of(data)(image), eval_transform(data)(image).numpy())


@pytest.mark.parametrize("crop", ["resize", "pad", "none"])
def test_scanned_digits(crop: str, digits: Path) -> None:
    data = settings(crop=crop, image_size=32)
    ours, theirs = Preprocess.of(data), eval_transform(data)
    with tarfile.open(min(digits.glob("test-*.tar"))) as tar:
        files = [tar.extractfile(member).read() for member in tar.getmembers() if member.name.endswith("png")]  # type: ignore[union-attr]
    for content in files[:20]:
        image = Image.open(io.BytesIO(content)).convert("RGB")
        np.testing.assert_array_equal(ours(image), theirs(image).numpy())


def test_other_modes_become_rgb() -> None:
    image = photo(40, 30)
    ours = Preprocess.of(settings(image_size=32))
    np.testing.assert_array_equal(ours(image.convert("L")), ours(image.convert("L").convert("RGB")))


def test_nonsense_is_refused() -> None:
    sound = Preprocess.of(settings()).model_dump()
    for change in ({"size": 0}, {"mean": [0.5]}, {"interpolation": "nearest"}, {"std": [float("nan")] * 3}, {"x": 1}):
        with pytest.raises(ValidationError):
            Preprocess.model_validate({**sound, **change})


def test_no_heavy_import() -> None:
    code = """
import sys, adaptive.inference.export.preprocess
print([m for m in ('torch', 'torchvision', 'timm') if m in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
