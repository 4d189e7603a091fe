"""Stored samples by their ids; of bad ones the next that can be read, or nothing, and a note."""

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
from adaptive.data.shards.reader import Raw, ShardReader
from adaptive.errors import DataError

PADDING = -1
Item = TypeVar("Item")
Maker = Callable[[bytes, int], Tensor]  # of a file's bytes and a sample's id


class Stored(NamedTuple):
    """A sample as it was read, or why it could not be, and the id that was asked for (-1 for padding)."""

    id: int
    raw: Raw | BadDataError | None


class Decoded(NamedTuple):
    """What was made of an image, its label (-1: left out), and the id of the sample that it really is."""

    image: Tensor | None
    label: int
    id: int


class SampleReader:
    """Reads and decodes samples of one split.

    Args:
        reader: of the split's shards.
        info: the split.
        num_classes: labels are below it.
        replace: whether the next readable sample takes a bad one's place (training), or nobody (evaluation).
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
        self._news: list[Fault] = []

    def read(self, ids: NDArray[np.int64]) -> list[Stored]:
        """Return the samples of a batch in the order asked for; on disk they are read shard by shard, forwards.

        Raises:
            DataError: a sample is bad and none may be.
        """
        stored = [Stored(PADDING, None)] * len(ids)
        shards, positions = locate(np.maximum(ids, 0), self._info.counts) if ids.max() >= 0 else (ids, ids)
        for place in np.lexsort((positions, shards)).tolist():
            if ids[place] != PADDING:
                stored[place] = self._read(int(ids[place]), int(shards[place]), int(positions[place]))
        return stored

    def decode(self, stored: Stored, maker: Maker) -> Decoded:
        """Return what ``maker`` makes of a stored sample's image, or of what takes its place.

        Args:
            maker: takes a file's bytes and the sample's id, and raises ImageError where they are no image.

        Raises:
            DataError: a sample is bad and none may be, more are than may be, or no other can be read.
        """
        if stored.raw is None:
            return Decoded(None, PADDING, PADDING)
        try:
            return self._decode(stored, maker)
        except BadDataError as error:
            self._note(stored.id, error)
            if not self._replace:
                return Decoded(None, PADDING, PADDING)
            return self._replacement(stored.id, error, maker)

    def take_news(self) -> list[Fault]:
        """Return the faults met since the last call."""
        news, self._news = self._news, []
        return news

    def _read(self, identity: int, shard: int, position: int) -> Stored:
        try:
            if known := self._lost.get(shard):
                raise BadDataError(str(known), known.kind, whole=True)
            return Stored(identity, self.reader.read(shard, position))
        except BadDataError as error:
            if not self._ledger.limit:
                raise
            if error.whole:
                self._lost[shard] = error
            return Stored(identity, error)

    def _decode(self, stored: Stored, maker: Maker) -> Decoded:
        raw = stored.raw
        if isinstance(raw, BadDataError):
            raise raw
        assert raw is not None
        return Decoded(decode_sample(raw, self._num_classes, lambda data: maker(data, stored.id)), raw.label, stored.id)

    def _note(self, identity: int, error: BadDataError) -> None:
        if not self._ledger.limit:
            raise error
        shard, _ = self._place(identity)
        fault = Fault(error.kind, self._info.shards[shard].name, identity, str(error))
        self._news.append(fault)
        self._ledger.add([fault], tell=False)
        self._ledger.check()

    def _replacement(self, identity: int, error: BadDataError, maker: Maker) -> Decoded:
        for other in self._others(identity, error):
            shard, position = self._place(other)
            try:
                return self._decode(self._read(other, shard, position), maker)
            except BadDataError as found:
                self._note(other, found)
        raise DataError(f"no sample of the split can be read, the last because: {error}")

    def _others(self, identity: int, error: BadDataError) -> Iterator[int]:
        """Yield what takes a sample's place: the next ids of its shard, or of the next shard from the same position."""
        counts = self._info.counts
        starts = np.cumsum([0, *counts])
        shard, position = self._place(identity)
        for step in range(len(counts)):
            current = (shard + step) % len(counts)
            own = step == 0
            if own and error.whole:
                continue
            for offset in range(1 if own else 0, counts[current]):
                if current in self._lost:
                    break
                yield int(starts[current]) + (position + offset) % counts[current]

    def _place(self, identity: int) -> tuple[int, int]:
        shards, positions = locate(np.array([identity]), self._info.counts)
        return int(shards[0]), int(positions[0])


def decode_sample(raw: Raw, num_classes: int, decoder: Callable[[bytes], Item]) -> Item:
    """Return what ``decoder`` makes of a sample's image.

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
