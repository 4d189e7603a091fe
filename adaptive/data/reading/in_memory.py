"""A split's images, decoded once and kept as bytes in memory, for datasets of small images (data.in_memory).

The memory is an anonymous file: processes of a machine share it, it has no name that could be left behind, and it is
freed when the last of them ends, however it ends. It counts as memory of the process, not of /dev/shm.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptive.config.sections import DataConfig
from adaptive.data.faults import Fault, Ledger
from adaptive.data.images.decode import decode_image
from adaptive.data.images.decode_window import to_pixels
from adaptive.data.reading.loading import LoaderOptions, Loading, made_batches
from adaptive.data.reading.order import evaluation_batches
from adaptive.data.reading.pipeline import BatchSource, SampleTransform, SplitShards
from adaptive.data.reading.schedule import EvaluationSchedule
from adaptive.data.shards.index import DatasetIndex
from adaptive.distributed.control_group import available_memory
from adaptive.errors import ConfigError, MachineError

BATCH = 256  # images that a loader process hands over at a time
NUMBERS = 2 * 8  # bytes of an image's label and id
MIB = 2**20


class Offer(NamedTuple):
    """How another process of this machine reaches the memory of a `DecodedSplit`, while its owner lives.

    ``path`` is empty where memory has no file by which it could be shared.
    """

    path: str
    samples: int
    image_size: int
    faults: Mapping[int, Fault]


@dataclass(frozen=True, eq=False)
class DecodedSplit:
    """All images of a split as pixels, in memory that the processes of a machine share.

    Attributes:
        pixels: uint8 (N, S, S, 3); row i shows what is taken for sample i.
        labels: (N,), -1 for a bad sample that is left out.
        ids: (N,), of the sample that row i shows: i, for a bad sample its replacement's, or -1 where it is left out.
        faults: of the bad samples, by their ids.
        handle: of the memory, open until `close_handle`; None where it cannot be shared.
    """

    pixels: Tensor
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]
    faults: dict[int, Fault]
    handle: int | None = None

    @classmethod
    def decode(
        cls, index: DatasetIndex, data: DataConfig, split: str, training: bool, workers: int = 0
    ) -> DecodedSplit:
        """Read and decode a split.

        Args:
            index: of the dataset at ``data.path``.
            data: how it is read.
            split: its split.
            training: a bad sample is replaced as in training; otherwise it is left out.
            workers: loader processes that decode; 0 decodes in this one.

        Raises:
            DataError: an image is not of data.image_size, or more samples are bad than data.max_bad.
            MachineError: memory is lacking, or a worker died.
        """
        info = index.split(split)
        decoded = cls._allocate(info.count, data.image_size)
        schedule = EvaluationSchedule(info.counts, evaluation_batches(info.count, BATCH, 0, 1))
        transform = SampleTransform(_Decoder(data.image_size, split), data.image_size)
        shards = SplitShards.of(index, data, split, 2)
        source = BatchSource(schedule, 0, len(schedule.ids), shards, transform, replace_bad=training)
        ledger, first = Ledger(data.max_bad), 0
        loading = Loading.of(data, BATCH, LoaderOptions(workers=min(workers, len(schedule.ids))))
        try:
            with closing(made_batches(source, loading, ledger)) as batches:
                for made in batches:
                    rows = slice(first, min(first + BATCH, info.count))
                    taken = rows.stop - first
                    decoded.pixels[rows] = made.images.permute(0, 2, 3, 1)[:taken]
                    decoded.labels[rows], decoded.ids[rows] = made.labels[:taken], made.ids[:taken]
                    first = rows.stop
        except BaseException:
            decoded.close_handle()
            raise
        decoded.faults.update(ledger.faults)
        return decoded

    @classmethod
    def attach(cls, offer: Offer) -> DecodedSplit:
        """Map what another process of this machine has decoded (raises MachineError where it has ended)."""
        try:
            handle = os.open(offer.path, os.O_RDWR)
        except OSError as error:
            raise MachineError(
                f"data.in_memory = true: the images that another rank of this machine holds cannot be reached "
                f"({error.strerror}: {offer.path}); use data.in_memory=false"
            ) from None
        try:
            return cls._map(handle, offer.samples, offer.image_size, dict(offer.faults))
        finally:
            os.close(handle)

    @property
    def shared(self) -> bool:
        """Whether other processes than those forked from this one can map it."""
        return self.handle is not None

    def offer(self) -> Offer:
        """Return what `attach` takes; it holds until `close_handle`."""
        path = f"/proc/{os.getpid()}/fd/{self.handle}" if self.shared else ""
        return Offer(path, len(self.labels), self.pixels.shape[1], self.faults)

    def close_handle(self) -> None:
        """Close the way by which other processes map it; what is mapped stays."""
        if self.handle is not None:
            with suppress(OSError):
                os.close(self.handle)

    @classmethod
    def _allocate(cls, count: int, size: int) -> DecodedSplit:
        needed = decoded_bytes(count, size)
        if not hasattr(os, "memfd_create"):
            return cls._map(-1, count, size, {})
        handle = os.memfd_create("adaptive-images")
        try:
            os.posix_fallocate(handle, 0, max(needed, 1))  # an error now, rather than the process killed later
        except OSError as error:
            os.close(handle)
            raise _too_large(needed, error.strerror or "no memory") from None
        return cls._map(handle, count, size, {}, handle)

    @classmethod
    def _map(
        cls, file: int, count: int, size: int, faults: dict[int, Fault], handle: int | None = None
    ) -> DecodedSplit:
        memory = mmap.mmap(file, max(decoded_bytes(count, size), 1))
        numbers = np.frombuffer(memory, np.int64, 2 * count).reshape(2, count)
        pixels = np.frombuffer(memory, np.uint8, count * size * size * 3, offset=count * NUMBERS)
        return cls(torch.from_numpy(pixels).view(count, size, size, 3), numbers[0], numbers[1], faults, handle)


@dataclass(frozen=True)
class _Decoder:
    """An image file's bytes to its pixels (3, size, size), refused where it has another size."""

    size: int
    split: str

    def __call__(self, image: bytes) -> Tensor:
        pixels = to_pixels(decode_image(image))
        height, width = pixels.shape[1:]
        if (height, width) != (self.size, self.size):
            one = f"an image of split {self.split!r} has {width} x {height} pixels"
            remedy = f"data.image_size={width}" if width == height else "images of one square size"
            raise ConfigError(
                f"data.in_memory = true, data.image_size = {self.size}, but {one}: memory holds images that need no "
                f"resizing; use {remedy}, or data.in_memory=false"
            )
        return pixels


def decoded_bytes(count: int, size: int) -> int:
    """Return the bytes that so many images of size x size pixels take, with their labels and ids."""
    return count * (size * size * 3 + NUMBERS)


def needed_bytes(index: DatasetIndex, data: DataConfig) -> int:
    """Return the bytes of memory that training and validation split take on each machine."""
    splits = {data.train_split, data.val_split}
    return sum(decoded_bytes(index.split(split).count, data.image_size) for split in splits)


def check_memory(index: DatasetIndex, data: DataConfig) -> None:
    """Refuse data.in_memory where the splits do not fit into this machine's memory (raises MachineError)."""
    needed, free = needed_bytes(index, data), available_memory()
    if needed > free:
        raise _too_large(needed, f"{free / MIB:,.0f} MiB are available")


def _too_large(needed: int, found: str) -> MachineError:
    return MachineError(
        f"data.in_memory = true: the decoded images take {needed / MIB:,.0f} MiB of this machine's memory ({found}); "
        "free or ask for memory (srun --mem, docker run --memory), or use data.in_memory=false"
    )
