"""Images by their sample ids, against the images that were packed."""

import numpy as np
import pytest
from PIL import Image

from adaptive.config.sections import DataConfig
from adaptive.data.packing.pack import pack
from adaptive.data.reading.images_by_id import read_images
from adaptive.data.reading.stream import EvaluationStream
from adaptive.data.shards.index import load_index
from adaptive.errors import DataError
from tests.data.conftest import make_photos
from tests.helpers.memory import at_most


def test_images_come_in_the_order_asked_for(digits):
    index = load_index(digits)
    counts = index.split("train").counts
    assert len(counts) > 1
    data = DataConfig(path=str(digits), image_size=8, mean=[0.0] * 3, std=[1.0] * 3, eval_crop=1.0)
    stream = EvaluationStream(index, data, "train", batch=2000)
    [batch] = stream
    ids = [sum(counts) - 1, 0, counts[0], 3, 3, counts[0] - 1]
    found = read_images(digits, index, "train", ids)
    for number, image in zip(ids, found, strict=True):
        place = batch.ids.tolist().index(number)
        expected = (batch.images[place] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        assert (np.asarray(image) == expected).all()
    assert read_images(digits, index, "train", []) == []


def test_images_keep_their_own_sizes(tmp_path):
    pack(make_photos(tmp_path / "photos"), tmp_path / "packed", progress=False, workers=1)
    index = load_index(tmp_path / "packed")
    [split] = [name for name, info in index.splits.items() if info.count == 12] or [max(index.splits)]
    sizes = {image.size for image in read_images(tmp_path / "packed", index, split, range(index.split(split).count))}
    assert sizes <= {(20 + 3 * n, 24) for n in range(4)}
    assert len(sizes) > 1


def test_large_images_are_reduced_where_that_is_asked_for(tmp_path):
    """Forty images of 4 megapixels, as a page may show, would fill 640 MB."""
    for number in range(2):
        (tmp_path / "in" / str(number)).mkdir(parents=True)
        Image.new("RGB", (2000, 2000), (9, 90, 200)).save(tmp_path / "in" / str(number) / "1.jpg")
    Image.new("RGB", (30, 20), (9, 90, 200)).save(tmp_path / "in" / "0" / "2.png")
    pack(tmp_path / "in", tmp_path / "packed", progress=False, workers=1)
    with at_most(300):
        found = read_images(
            tmp_path / "packed", load_index(tmp_path / "packed"), "train", [0, 1, 2] * 20, None, 1 << 18
        )
    assert {image.size for image in found} == {(500, 500), (30, 20)}
    assert all(image.getpixel((3, 3)) == pytest.approx((9, 90, 200), abs=3) for image in found)


def test_ids_beyond_the_split_and_missing_shards_are_refused(digits, tmp_path):
    index = load_index(digits)
    with pytest.raises(DataError, match=r"split train of .*are not all in"):
        read_images(digits, index, "train", [0, 10**6])
    with pytest.raises(DataError, match="no split"):
        read_images(digits, index, "tset", [0])
    with pytest.raises(DataError, match="lacks"):
        read_images(tmp_path, index, "train", [0])
