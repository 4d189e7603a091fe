"""From a source of batches to the batches of a rank: worker processes, faults, and the way to the device."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from adaptive.config.sections import DataConfig
from adaptive.data.faults import Fault, Ledger
from adaptive.data.images.crop_flip import crop_flip_pixels
from adaptive.data.images.encoded import BatchDecoder, is_encoded
from adaptive.data.images.normalize import Normalize
from adaptive.data.reading.samples import PADDING
from adaptive.data.reading.workers import HungWorkerError, iterate, shared_memory_error
from adaptive.errors import AdaptiveError, DataError, MachineError

CPU = torch.device("cpu")
MAX_RESTARTS = 3  # after hung workers in a row; more of them have a cause that further ones would meet as well
_LOG = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (N, 3, H, W) float32, normalised, on the stream's device; labels and sample ids, (N,) int64, on the CPU.

    Padding is 0, -1 and -1.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


@dataclass(frozen=True)
class LoaderOptions:
    """Who loads batches, and where they go; by default a single process without workers, on the CPU.

    Attributes:
        rank: of this process.
        world: number of ranks.
        workers: loader processes of this rank; 0 loads in this one.
        device: on which images are normalised.
        layout: memory format of the images.
    """

    rank: int = 0
    world: int = 1
    workers: int = 0
    device: torch.device = CPU
    layout: torch.memory_format = torch.contiguous_format


class Crop(NamedTuple):
    """A crop and flip that is left to the device: arguments of `crop_flip_pixels`."""

    places: NDArray[np.int64]
    padding: int


class WorkerBatch(NamedTuple):
    """A batch as a worker hands it over: images (N, 3, H, W), created in shared memory, and numbers as numpy's arrays.

    A tensor elsewhere would be copied to shared memory on its way, and be lost silently where there is no room.
    """

    images: Tensor
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    crop: Crop | None = None


@dataclass(frozen=True)
class _Failure:
    """A user's error as a value, on its way out of a worker: the loader would wrap an exception in its traceback."""

    kind: type[AdaptiveError]
    message: str


Delivered = tuple[WorkerBatch, list[Fault]] | _Failure


@dataclass(frozen=True)
class Loading:
    """Samples per batch, worker processes, and how a batch is finished in the rank's own process.

    Workers hand over uint8 pixels: a quarter of the bytes to copy to this process and on to the device.
    """

    batch: int
    workers: int
    device: torch.device
    normalize: Normalize
    decoder: BatchDecoder | None = None

    @classmethod
    def of(cls, data: DataConfig, batch: int, loader: LoaderOptions) -> Loading:
        """Return how ``loader`` loads batches of this many samples."""
        return cls(batch, loader.workers, loader.device, Normalize(data.mean, data.std, loader.device, loader.layout))

    @property
    def pinned(self) -> bool:
        """Whether batches are made in pinned memory, from which copies to a GPU need not be waited for."""
        return self.device.type == "cuda"

    @property
    def crops_on_device(self) -> bool:
        """Whether whole images, as they lie in memory, are cropped and flipped on the device."""
        return self.device.type != "cpu"

    def finish(self, made: WorkerBatch) -> Batch:
        """Return the batch with its images on the device, normalised; padding stays 0."""
        encoded = self.decoder is not None and is_encoded([made.images])
        pixels = self.decoder(made.images, made.ids.tolist()) if self.decoder and encoded else made.images
        images = pixels.to(self.device, non_blocking=True)
        if made.crop is not None:
            places = torch.from_numpy(made.crop.places)
            # A copy from other memory would wait until the device has done all that was queued.
            places = (places.pin_memory() if self.pinned else places).to(self.device, non_blocking=True)
            images = crop_flip_pixels(images.permute(0, 2, 3, 1), places, made.crop.padding).permute(0, 3, 1, 2)
        if images.dtype == torch.uint8:
            images = self.normalize(images)
            for row in np.flatnonzero(made.labels == PADDING).tolist():  # few or none
                images[row] = 0
        else:  # normalised by the transform
            images = images.contiguous(memory_format=self.normalize.layout)
        labels = torch.from_numpy(made.labels)
        return Batch(images, labels.pin_memory() if self.pinned else labels, torch.from_numpy(made.ids))


class Source(Protocol):
    """Batches, numbered, that worker processes make."""

    def pipeline(self, loading: Loading) -> IterableDataset[Any]:
        """Return what every worker iterates: its share of the batches, as `deliver` yields them."""

    def rest(self) -> Source:
        """Return the source without its first batch."""


def worker_numbers(first: int, last: int) -> range:
    """Return the numbers of this worker's batches among [first, last): every n-th of n workers."""
    worker = get_worker_info()
    offset, step = (worker.id, worker.num_workers) if worker else (0, 1)
    return range(first + offset, last, step)


def deliver(batches: Iterator[tuple[WorkerBatch, list[Fault]]]) -> Iterator[Delivered]:
    """Yield batches, each with the faults met while it was made; a user's error ends them as a value."""
    try:
        yield from batches
    except RuntimeError as error:
        yield _Failure(MachineError, str(shared_memory_error(error)))
    except AdaptiveError as error:
        yield _Failure(MachineError if isinstance(error, MachineError) else DataError, str(error))


def made_batches(source: Source, loading: Loading, *ledgers: Ledger) -> Generator[WorkerBatch, None, None]:
    """Yield the source's batches as workers made them; a hung worker is replaced, and ``ledgers`` take the faults met.

    Raises:
        DataError: a sample cannot be read, or a ledger has more faults than its limit.
        MachineError: a worker died, several hung, or the cache cannot be written.
    """
    hung = 0  # workers in a row, without a batch in between
    while True:
        try:
            with closing(iterate(source.pipeline(loading), loading.workers, loading.pinned)) as items:
                for item in items:
                    if isinstance(item, _Failure):
                        raise item.kind(item.message)
                    batch, faults = item
                    for number, ledger in enumerate(ledgers):
                        ledger.add(faults, warn=number == 0)
                        ledger.check()
                    source, hung = source.rest(), 0
                    yield batch
                return
        except HungWorkerError as error:
            hung += 1
            if hung > MAX_RESTARTS:
                message = f"{error}, like {MAX_RESTARTS} before it; data.workers=0 does without them"
                raise MachineError(message) from None
            _LOG.warning("%s: the workers are started again, and nothing is lost", error)


def load_batches(source: Source, loading: Loading, *ledgers: Ledger) -> Iterator[Batch]:
    """Yield the source's batches, finished on the device (raises as `made_batches` does)."""
    with closing(made_batches(source, loading, *ledgers)) as batches:
        for batch in batches:
            yield loading.finish(batch)
