"""Images of a split by their sample ids, as they are stored, for reports to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from adaptive.config.sections import DataConfig
from adaptive.data.images.decode import ImageError, decode_image
from adaptive.data.reading.order import locate
from adaptive.data.remote.urls import is_remote
from adaptive.data.shards.cache import shard_files
from adaptive.data.shards.index import DatasetIndex, check_shards
from adaptive.data.shards.reader import ShardReader
from adaptive.errors import DataError


def read_images(
    folder: str | Path,
    index: DatasetIndex,
    split: str,
    ids: Sequence[int],
    settings: DataConfig | None = None,
    most_pixels: int | None = None,
) -> list[Image.Image]:
    """Return the stored images (RGB, their own sizes) of these sample ids, in the order of ``ids``.

    Args:
        folder: of the packed dataset, or its URL.
        index: its index.
        split: its split.
        ids: numbers of the samples in the split, as batches carry them; repeats are allowed.
        settings: how a URL is read; by default with the defaults of the configuration.
        most_pixels: larger images are reduced to about so many; by default none is.

    Raises:
        DataError: no such split, a shard is missing, an id is beyond the split, or an image cannot be decoded.
    """
    if not is_remote(folder):
        check_shards(index, folder, split, settings=settings, quiet=True)
    info = index.split(split)
    wanted = np.asarray(ids, dtype=np.int64)
    try:
        shards, positions = locate(wanted, info.counts)
    except IndexError as error:
        raise DataError(f"split {split} of {folder}: {error}") from None
    images: list[Image.Image | None] = [None] * len(wanted)
    reader = ShardReader(shard_files(folder, index, settings), info.shards, capacity=1)
    try:
        # Sorted by shard, so that each is opened once whatever the order of ids.
        for row in np.lexsort((positions, shards)).tolist():
            raw = reader.read(int(shards[row]), int(positions[row]))
            try:
                images[row] = _reduced(decode_image(raw.image), most_pixels)
            except ImageError as error:
                raise DataError(
                    f"shard {raw.shard}, sample {raw.key}: {error}; copy the shard again or pack again"
                ) from None
    finally:
        reader.close()
    return [image for image in images if image is not None]


def _reduced(image: Image.Image, most_pixels: int | None) -> Image.Image:
    pixels = image.width * image.height
    return (
        image
        if most_pixels is None or pixels <= most_pixels
        else image.reduce(math.ceil(math.sqrt(pixels / most_pixels)))
    )
