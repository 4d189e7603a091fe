"""The first images of a split, with their labels: what times are measured on."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive.config.sections import DataConfig
from adaptive.data.reading.stream import EvaluationStream
from adaptive.data.shards.index import DatasetIndex, check_shards, check_split
from adaptive.errors import DataError
from adaptive.foreign_text import shown_location


def first_images(index: DatasetIndex, data: DataConfig, split: str, count: int, flag: str) -> tuple[Tensor, Tensor]:
    """Return the first images of a split, each of them once, as the network takes them.

    Args:
        index: of the dataset.
        data: where it lies, and how its images are made ready.
        split: its name.
        count: how many; fewer where the split holds fewer.
        flag: flag or key that gave the split, for messages.

    Returns:
        Images (N, C, H, W) and labels (N,), on the CPU.

    Raises:
        DataError: no such split, or images that cannot be read.
    """
    check_split(index, flag, split)
    check_shards(index, data.path, split, settings=data)
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in EvaluationStream(index, data, split, batch=min(count, 256)):
        real = batch.labels >= 0
        images.append(batch.images[real])
        labels.append(batch.labels[real])
        if sum(map(len, labels)) >= count:
            break
    if not sum(map(len, labels)):
        raise DataError(f"{flag} = {split!r}: this split of {shown_location(data.path)} holds no images; give another")
    return torch.cat(images)[:count], torch.cat(labels)[:count]
