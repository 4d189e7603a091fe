"""Counts of images by the exit that they left at and its confidence in them; no torch here."""

from __future__ import annotations

from threading import Lock
from typing import Annotated, Any

from array_api_compat import array_namespace, device
from pydantic import Field, model_validator

from adaptive.errors import PolicyError
from adaptive.inference.frozen_model import FrozenModel

Array = Any  # a torch tensor or a numpy array

# Between bins of confidence; finer near 1, where the images that leave early are.
EDGES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)
_AT_ONCE = 4096  # images that wait to be counted together
_MOST_BATCHES = 256


class Counts(FrozenModel):
    """How many images left at each of k exits, by bins of the confidence that they left with."""

    edges: list[float] = Field(default=list(EDGES))
    """Between the bins, rising; a confidence on an edge is above it."""
    cells: Annotated[list[list[Annotated[int, Field(ge=0)]]], Field(min_length=1)]
    """(k, bins) images."""

    @model_validator(mode="after")
    def _fits(self) -> Counts:
        if any(len(row) != len(self.edges) + 1 for row in self.cells):
            raise ValueError(f"cells: {len(self.edges)} edges make {len(self.edges) + 1} bins at every exit")
        return self

    @classmethod
    def none(cls, exits: int) -> Counts:
        """No image at any of k exits."""
        return cls(cells=[[0] * (len(EDGES) + 1) for _ in range(exits)])

    @classmethod
    def of(cls, exits: Array, confidences: Array, number: int) -> Counts:
        """Count images (N,) by their exits, from 1 to ``number``, and confidences."""
        tally = Tally(number)
        tally.add(exits, confidences)
        return tally.counts()

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(self.leaving)

    @property
    def leaving(self) -> list[int]:
        """How many left at each exit, (k,)."""
        return [sum(row) for row in self.cells]

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both (raises PolicyError where they have other exits or bins)."""
        self.check_like(other)
        cells = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(self.cells, other.cells, strict=True)]
        return Counts(edges=self.edges, cells=cells)

    def check_like(self, other: Counts) -> None:
        """Refuse counts of another number of exits, or in other bins (PolicyError)."""
        if len(self.cells) != len(other.cells):
            raise PolicyError(f"counts at {len(self.cells)} and at {len(other.cells)} exits: they are of two networks")
        if self.edges != other.edges:
            raise PolicyError("counts in other bins of confidence, of another version; count and calibrate anew")


class Tally:
    """Counts that a runner keeps; what it is given waits on its device, and is counted some thousand images at a time.

    Nothing is copied to the host before `counts` is called. Threads may share it.

    Args:
        exits: k.
    """

    def __init__(self, exits: int) -> None:
        self.exits = exits
        self._cells: Array | None = None  # (k * bins,)
        self._waiting: list[tuple[Array, Array]] = []
        self._images = 0  # that wait
        self._lock = Lock()

    def add(self, exits: Array, confidences: Array) -> None:
        """Count images by their exits (N,), from 1 to k, and confidences (N,), which may be changed afterwards."""
        xp = array_namespace(exits)
        with self._lock:
            self._waiting.append((xp.asarray(exits, copy=True), xp.asarray(confidences, copy=True)))
            self._images += len(exits)
            if len(self._waiting) >= _MOST_BATCHES or self._images >= _AT_ONCE:
                self._count()

    def counts(self) -> Counts:
        """Return what was counted so far."""
        with self._lock:
            self._count()
            flat = [0] * (self.exits * (len(EDGES) + 1)) if self._cells is None else self._cells.tolist()
        bins = len(EDGES) + 1
        return Counts(cells=[flat[i * bins : (i + 1) * bins] for i in range(self.exits)])

    def _count(self) -> None:
        if not self._waiting:
            return
        xp = array_namespace(self._waiting[0][0])
        exits, confidences = (xp.concat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self._images = 0
        confidences = xp.astype(confidences, xp.float32)
        edges = xp.asarray(EDGES, dtype=xp.float32, device=device(confidences))
        bins = len(EDGES) + 1
        cells = (exits - 1) * bins + xp.sum(confidences[:, None] >= edges[None, :], axis=1, dtype=exits.dtype)
        numbers = xp.arange(self.exits * bins, device=device(exits))
        found = xp.sum(cells[:, None] == numbers[None, :], axis=0, dtype=xp.int64)
        self._cells = found if self._cells is None else self._cells + found
