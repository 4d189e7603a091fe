"""Batches from a split that is held decoded in memory: gathered by id, cropped and flipped all at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from adaptive.data.faults import Fault
from adaptive.data.images.crop_flip import CropFlipDraws, crop_flip_bytes, crop_flip_places
from adaptive.data.reading.in_memory import DecodedSplit
from adaptive.data.reading.loading import Crop, Delivered, Loading, WorkerBatch, deliver
from adaptive.data.reading.samples import PADDING
from adaptive.data.reading.schedule import Schedule


@dataclass(frozen=True)
class CropFlip:
    """The augmentation of training: draws, pixels of padding, and the probability of a flip."""

    draws: CropFlipDraws
    padding: int
    flip: float

    def places(self, epoch: int, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the images are cropped in an epoch, and which are flipped, as `crop_flip_pixels` takes it."""
        return crop_flip_places(self.draws.of(epoch, ids), self.padding, self.flip)


@dataclass(frozen=True)
class InMemorySource:
    """Batches [first, last) of a schedule from memory; ``augment`` is None in evaluation."""

    schedule: Schedule
    first: int
    last: int
    split: DecodedSplit
    augment: CropFlip | None

    def pipeline(self, loading: Loading) -> IterableDataset[Any]:
        """Return what the loader iterates, in this process."""
        return _Batches(self, loading.crops_on_device)

    def rest(self) -> InMemorySource:
        """Return the source without its first batch."""
        return replace(self, first=self.first + 1)

    def batches(self, crop_later: bool) -> Iterator[tuple[WorkerBatch, list[Fault]]]:
        """Yield the batches with the faults of the samples that they asked for."""
        split = self.split
        for number in range(self.first, self.last):
            epoch, asked = self.schedule.batch(number)
            rows = np.maximum(asked, 0)
            ids = np.where(asked == PADDING, PADDING, split.ids[rows])
            labels = np.where(asked == PADDING, PADDING, split.labels[rows])
            # Copies image by image, where [rows] would copy byte by byte.
            pixels, crop = split.pixels.index_select(0, torch.from_numpy(rows)), None
            if self.augment is not None:
                places = self.augment.places(epoch, ids)
                if crop_later:
                    crop = Crop(places, self.augment.padding)
                else:
                    pixels = crop_flip_bytes(pixels, places, self.augment.padding)
            faults = [split.faults[i] for i in asked.tolist() if i in split.faults] if split.faults else []
            yield WorkerBatch(pixels.permute(0, 3, 1, 2), labels, ids, crop), faults


class _Batches(IterableDataset[Any]):
    def __init__(self, source: InMemorySource, crop_later: bool) -> None:
        self.source, self.crop_later = source, crop_later

    def __iter__(self) -> Iterator[Delivered]:
        return deliver(self.source.batches(self.crop_later))
