"""Bad data: the kinds of faults that a sample or shard can have, and a count of those that a run has met."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from adaptive.errors import DataError

MISSING = "missing shard"
UNREADABLE = "unreadable shard"
TRUNCATED = "truncated shard"
CHECKSUM = "checksum mismatch"
COUNT = "wrong sample count"
MEMBER = "corrupt member"
IMAGE = "undecodable image"
LABEL = "wrong label"
DAMAGED = "damaged image"  # it decodes, but a part of it is lost: found by verifying alone
CLASSES = "wrong classes"  # of all of the dataset

LISTED = 10  # faults that a message spells out
_LOG = logging.getLogger(__name__)


class BadDataError(DataError):
    """A sample, named by ``key``, or with ``whole`` all of its shard is bad; ``kind`` is one of this module's."""

    def __init__(self, message: str, kind: str, key: str = "", whole: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.key = key
        self.whole = whole


class Fault(NamedTuple):
    """A bad sample: the kind of its fault, its shard, its id in the split, and the error message."""

    kind: str
    shard: str
    id: int
    message: str


class Ledger:
    """The distinct bad samples that a run has met, each counted once, however often and by how many workers it is met.

    ``limit`` is how many may be met (data.max_bad).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._found: dict[int, Fault] = {}
        self._warned: set[tuple[str, str]] = set()  # kinds and shards

    @property
    def count(self) -> int:
        """Number of distinct bad samples."""
        return len(self._found)

    @property
    def faults(self) -> Mapping[int, Fault]:
        """The distinct bad samples by their ids."""
        return self._found

    @property
    def by_kind(self) -> dict[str, int]:
        """Number of distinct bad samples of each kind that was met."""
        return dict(Counter(fault.kind for fault in self._found.values()))

    def add(self, faults: Iterable[Fault], warn: bool = True) -> None:
        """Enter faults; with ``warn`` the first of every kind in every shard is logged as a warning."""
        for fault in faults:
            if self._found.setdefault(fault.id, fault) is not fault or not warn:
                continue
            if (fault.kind, fault.shard) not in self._warned:
                self._warned.add((fault.kind, fault.shard))
                further = "further ones of this kind in this shard are not shown"
                _LOG.warning("bad data, %s: %s (%s)", fault.kind, fault.message, further)

    def check(self) -> None:
        """Raise DataError, with a list of the faults, when there are more than the limit."""
        if self.count > self.limit:
            raise DataError(
                f"{self.count} bad samples, data.max_bad = {self.limit} allows no more: "
                f"{describe(self._found.values())}; look at all of them with: adaptive pack --verify DATASET, mend the "
                "dataset, or raise data.max_bad"
            )


def describe(faults: Iterable[Fault]) -> str:
    """Return one line: the first faults spelt out, the others counted by kind."""
    faults = list(faults)
    parts = [f"{fault.kind}: {fault.message}" for fault in faults[:LISTED]]
    rest = Counter(fault.kind for fault in faults[LISTED:])
    parts += [f"and {count} more of kind {kind}" for kind, count in sorted(rest.items())]
    return " | ".join(parts)


def counted(by_kind: Mapping[str, int]) -> str:
    """Return for example '3 undecodable image, 1 wrong label'."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(by_kind.items()))
