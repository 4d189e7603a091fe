"""Samples of a split by their ids, read and decoded; a bad one is noted, and replaced or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adaptive.data.faults import IMAGE, LABEL, BadDataError, Fault, Ledger
from adaptive.data.images.decode import ImageError
from adaptive.data.reading.order import locate
from adaptive.data.shards.index import SplitInfo
from adaptive.data.shards.reader import RawSample, ShardReader
from adaptive.errors import DataError

PADDING = -1
Item = TypeVar("Item")
Transform = Callable[[bytes, int], Tensor]  # of a file's bytes and a sample's id


class StoredSample(NamedTuple):
    """A sample as read from its shard, or the reason why it could not be, and the requested id (-1 for padding)."""

    id: int
    raw: RawSample | BadDataError | None


class DecodedSample(NamedTuple):
    """A transformed image, its label (-1: left out), and the id of its sample, which may be a replacement's."""

    image: Tensor | None
    label: int
    id: int


class SampleReader:
    """Reads and decodes samples of one split.

    Args:
        reader: of the split's shards.
        info: the split.
        num_classes: labels are below it.
        replace: whether a bad sample is replaced by the next readable one (training) or left out (evaluation).
        max_bad: distinct bad samples that may be met; with 0 the first is raised as it is.
    """

    def __init__(
        self,
        reader: ShardReader,
        info: SplitInfo,
        num_classes: int,
        replace: bool,
        max_bad: int,
    ) -> None:
        self.reader = reader
        self._info = info
        self._num_classes = num_classes
        self._replace = replace
        self._ledger = Ledger(max_bad)
        self._lost: dict[int, BadDataError] = {}  # shards that are bad as a whole
        self._new_faults: list[Fault] = []

    def read(self, ids: NDArray[np.int64]) -> list[StoredSample]:
        """Return the samples of a batch in the order of ``ids``; from disk they are read shard by shard, forwards.

        Raises:
            DataError: a sample is bad and none may be.
        """
        stored = [StoredSample(PADDING, None)] * len(ids)
        shards, positions = locate(np.maximum(ids, 0), self._info.counts) if ids.max() >= 0 else (ids, ids)
        for row in np.lexsort((positions, shards)).tolist():
            if ids[row] != PADDING:
                stored[row] = self._read(int(ids[row]), int(shards[row]), int(positions[row]))
        return stored

    def decode(self, stored: StoredSample, transform: Transform) -> DecodedSample:
        """Return a stored sample's image, or its replacement's, as ``transform`` decodes it.

        Args:
            stored: the sample.
            transform: takes a file's bytes and the sample's id, and raises ImageError where they are no image.

        Raises:
            DataError: more samples are bad than may be, or none is left that can be read.
        """
        if stored.raw is None:
            return DecodedSample(None, PADDING, PADDING)
        try:
            return self._decode(stored, transform)
        except BadDataError as error:
            self._note(stored.id, error)
            if not self._replace:
                return DecodedSample(None, PADDING, PADDING)
            return self._replacement(stored.id, error, transform)

    def take_new_faults(self) -> list[Fault]:
        """Return the faults met since the last call."""
        faults, self._new_faults = self._new_faults, []
        return faults

    def _read(self, identity: int, shard: int, position: int) -> StoredSample:
        try:
            if known := self._lost.get(shard):
                raise BadDataError(str(known), known.kind, whole=True)
            return StoredSample(identity, self.reader.read(shard, position))
        except BadDataError as error:
            if not self._ledger.limit:
                raise
            if error.whole:
                self._lost[shard] = error
            return StoredSample(identity, error)

    def _decode(self, stored: StoredSample, transform: Transform) -> DecodedSample:
        raw = stored.raw
        if isinstance(raw, BadDataError):
            raise raw
        assert raw is not None
        image = decode_sample(raw, self._num_classes, lambda data: transform(data, stored.id))
        return DecodedSample(image, raw.label, stored.id)

    def _note(self, identity: int, error: BadDataError) -> None:
        if not self._ledger.limit:
            raise error
        shard, _ = self._locate(identity)
        fault = Fault(error.kind, self._info.shards[shard].name, identity, str(error))
        self._new_faults.append(fault)
        self._ledger.add([fault], warn=False)
        self._ledger.check()

    def _replacement(self, identity: int, error: BadDataError, transform: Transform) -> DecodedSample:
        for other in self._others(identity, error):
            shard, position = self._locate(other)
            try:
                return self._decode(self._read(other, shard, position), transform)
            except BadDataError as found:
                self._note(other, found)
        raise DataError(f"no sample of the split can be read, the last because: {error}")

    def _others(self, identity: int, error: BadDataError) -> Iterator[int]:
        """Yield the ids of possible replacements: the rest of its shard, then the next shards, from its position."""
        counts = self._info.counts
        starts = np.cumsum([0, *counts])
        shard, position = self._locate(identity)
        for step in range(len(counts)):
            current = (shard + step) % len(counts)
            own = step == 0
            if own and error.whole:
                continue
            for offset in range(1 if own else 0, counts[current]):
                if current in self._lost:
                    break
                yield int(starts[current]) + (position + offset) % counts[current]

    def _locate(self, identity: int) -> tuple[int, int]:
        shards, positions = locate(np.array([identity]), self._info.counts)
        return int(shards[0]), int(positions[0])


def decode_sample(raw: RawSample, num_classes: int, decoder: Callable[[bytes], Item]) -> Item:
    """Return a sample's image as ``decoder`` decodes its bytes.

    Raises:
        BadDataError: the image cannot be decoded (an ImageError of ``decoder``), or its label is not below num_classes.
    """
    where = f"shard {raw.shard}, sample {raw.key}"
    if not 0 <= raw.label < num_classes:
        message = f"{where}: label {str(raw.label)[:20]} is not in 0..{num_classes - 1}; pack again"
        raise BadDataError(message, LABEL, raw.key)
    try:
        return decoder(raw.image)
    except ImageError as error:
        message = f"{where}: {error}; copy the shard again or pack again"
        raise BadDataError(message, IMAGE, raw.key) from None
