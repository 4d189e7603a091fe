"""Bad data: what kinds there are, and how much of it a run has met."""

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

LISTED = 10  # faults that a message spells out
_LOG = logging.getLogger(__name__)


class BadDataError(DataError):
    """A sample (``key`` names it), or with ``whole`` its shard, is bad; ``kind`` is one of this module's."""

    def __init__(self, message: str, kind: str, key: str = "", whole: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.key = key
        self.whole = whole


class Fault(NamedTuple):
    """One bad sample that was met: its kind, shard, sample id in the split, and the whole line about it."""

    kind: str
    shard: str
    id: int
    message: str


class Ledger:
    """Distinct bad samples met so far; counted once each, however often and by whomever they are met.

    ``limit`` is how many may be met (data.max_bad).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._found: dict[int, Fault] = {}
        self._told: set[tuple[str, str]] = set()

    @property
    def count(self) -> int:
        """Number of distinct bad samples."""
        return len(self._found)

    @property
    def by_kind(self) -> dict[str, int]:
        """Number of distinct bad samples of each kind that was met."""
        return dict(Counter(fault.kind for fault in self._found.values()))

    def add(self, faults: Iterable[Fault], tell: bool = True) -> None:
        """Enter faults; with ``tell`` the first of every kind in every shard is logged as a warning."""
        for fault in faults:
            if self._found.setdefault(fault.id, fault) is not fault or not tell:
                continue
            if (fault.kind, fault.shard) not in self._told:
                self._told.add((fault.kind, fault.shard))
                _LOG.warning("bad data, %s: %s (further ones of this kind in this shard are not shown)", *_two(fault))

    def check(self) -> None:
        """Raise DataError with a list of what was found when it is more than the limit."""
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


def _two(fault: Fault) -> tuple[str, str]:
    return fault.kind, fault.message
