"""Long and thin images: the pixels of a resize of the whole image, without its memory, at every door."""

from __future__ import annotations

import io
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from adaptive.config.sections import DataConfig
from adaptive.data.images.encoded import BatchDecoder, EncodedTransform, pack_records
from adaptive.data.images.resizing import FILTERS, MOST, ResizedView, resized_for, resized_size
from adaptive.data.images.transforms import drawn_transform, eval_transform, train_transform
from adaptive.data.packing.verify import verify
from adaptive.data.seeding import seeded
from adaptive.inference.export.preprocess import Preprocess
from tests.data.conftest import report
from tests.helpers.memory import at_most

STRIPS = [(500_000, 1), (1, 500_000), (60_000, 20)]


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng([width, height]).integers(0, 256, (height, width, 3), dtype=np.uint8))


def strip(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (width, height), 77).save(stream, "png")
    return stream.getvalue()


def settings(crop: str, image_size: int = 224, **values: object) -> DataConfig:
    return DataConfig.model_validate({"path": "x", "crop": crop, "image_size": image_size, **values})


@pytest.mark.parametrize("method", FILTERS.values())
@pytest.mark.parametrize(("width", "height"), [(5000, 7), (7, 5000), (3001, 40), (1, 900), (4001, 31)])
def test_a_view_has_the_pixels_of_the_whole_image(width: int, height: int, method: Image.Resampling) -> None:
    """Up to rounding, in the middle, at the edges and beyond them."""
    image = noise(width, height)
    size = resized_size(image.size, 16, squash=False)
    view, whole = resized_for(image, size, method, 12), image.resize(size, method)
    assert isinstance(view, ResizedView)
    assert view.size == whole.size
    last = max(size) - 12
    for along, across in product((-4, 0, 1, last // 2, last, last + 3), (-4, 0, 4)):
        left, top = (along, across) if width > height else (across, along)
        box = (left, top, left + 12, top + 12)
        found, expected = (np.asarray(one.crop(box)).astype(int) for one in (view, whole))
        assert found.shape == (12, 12, 3)
        assert np.abs(found - expected).max() <= 1
        assert (found != expected).mean() < 0.01
    assert not np.asarray(view.crop((-20, -20, -8, -8))).any()


@pytest.mark.parametrize("shape", [(4000, 3000), (3000, 4000), (1200, 40), (40, 1200), (20, 20), (1, 1)])
@pytest.mark.parametrize("squash", [True, False])
def test_images_of_usual_shapes_are_resized_as_a_whole(shape: tuple[int, int], squash: bool) -> None:
    image = noise(*shape)
    size = resized_size(shape, 36, squash)
    found = resized_for(image, size, FILTERS["bicubic"], 32)
    assert isinstance(found, Image.Image)
    assert np.array_equal(np.asarray(found), np.asarray(image.resize(size, FILTERS["bicubic"])))


@pytest.mark.parametrize("crop", ["resize", "pad", "none"])
@pytest.mark.parametrize("shape", STRIPS)
def test_no_strip_takes_much_memory(crop: str, shape: tuple[int, int]) -> None:
    """Evaluation and training, by either way of drawing, and what an export does, which is evaluation's."""
    data = settings(crop)
    file = strip(*shape)
    image = Image.new("RGB", shape, (77, 77, 77))
    evaluate = eval_transform(data, normalize=False)
    with at_most(300):
        assert (evaluate(image) == 77).all()
        exported = Preprocess.of(data)(image)
        assert np.abs(exported - eval_transform(data)(image).numpy()).max() < 1e-6
        with seeded(1):
            trained = train_transform(data, normalize=False)(file)
        assert trained.shape == (3, 224, 224)
        assert set(trained.unique().tolist()) <= {0, 77}
        if crop != "resize":
            drawn = drawn_transform(data)(file, np.array([0.7, 0.3, 0.1]))
            assert drawn.shape == (3, 224, 224)
            assert (drawn == 77).float().mean() > 0.9


@pytest.mark.full
def test_a_strip_is_packed_with_and_without_shrinking(tmp_path: Path) -> None:
    for number, shape in enumerate(STRIPS):
        (tmp_path / "in" / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{number % 2}" / f"{number}.png").write_bytes(strip(*shape))
    with at_most(300):
        for side in (None, 320):
            found = report(tmp_path / "in", tmp_path / f"out-{side}", max_side=side)
            assert (found.index.split("train").count, found.converted) == (3, 3 if side else 0)
            assert verify(str(tmp_path / f"out-{side}"), workers=1, progress=False).fine == 3


def test_a_strip_of_a_jpeg_on_its_way_to_a_gpu() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (60_000, 1), (77, 77, 77)).save(stream, "jpeg")
    with at_most(300):
        record = EncodedTransform(settings("resize"))(stream.getvalue())
        decoder = BatchDecoder(224, torch.device("cpu"), lambda files: [torch.full((3, 1, 60_000), 77).byte()])
        assert (decoder(pack_records([record]), [0]) == 77).all()


def test_a_crop_of_a_tiny_share_is_not_made_of_a_huge_image() -> None:
    """Of an image a thousand times as large as the crop only the crop is made."""
    with at_most(100):
        found = eval_transform(settings("resize", 32, eval_crop=0.001), normalize=False)(noise(50, 50))
    assert found.shape == (3, 32, 32)


def test_what_is_made_is_bounded() -> None:
    for width in range(1, 4000, 37):
        size = resized_size((width, 10), 36, squash=False)
        found = resized_for(Image.new("RGB", (width, 10)), size, FILTERS["bilinear"], 32)
        assert isinstance(found, ResizedView) == (size[0] * size[1] > MOST * 32 * 32)
