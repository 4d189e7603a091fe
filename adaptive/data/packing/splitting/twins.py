"""Twins: images with the same bytes, found before they are divided, or afterwards by the digests of what was packed."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptive.data.packing.sources import Item, read_item

MOST_COMPARED = 100_000  # images of equal size that are read before the hold-out is drawn
DIGEST_CHARACTERS = 16  # 64 bits, in hexadecimal
_LISTED = 3
_ORDER = {"train": 0, "val": 1, "test": 2}


def digest(content: bytes) -> str:
    """Return a short digest of an image file."""
    return hashlib.blake2b(content, digest_size=DIGEST_CHARACTERS // 2).hexdigest()


def find_twins(root: Path | None, items: Sequence[Item]) -> dict[int, list[int]] | None:
    """Return the positions of the images that have the same bytes, by each of them.

    Only images of one size can be twins, and these are read, unless there are over `MOST_COMPARED`: then None.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for number, item in enumerate(items):
        by_size[item.size].append(number)
    candidates = [numbers for size, numbers in by_size.items() if size and len(numbers) > 1]
    if sum(map(len, candidates)) > MOST_COMPARED:
        return None
    groups: dict[tuple[int, str], list[int]] = defaultdict(list)
    for numbers in candidates:
        for number in numbers:
            try:
                groups[items[number].size, digest(read_item(root, items[number]))].append(number)
            except OSError:
                continue  # packing it will say why
    return {number: group for group in groups.values() if len(group) > 1 for number in group}


def twin_notes(packed: Mapping[str, Sequence[tuple[list[Item], str]]], classes: Sequence[str]) -> list[str]:
    """Return sentences about images with the same bytes that lie in several splits, or are of several classes.

    Args:
        packed: of every split the images that were packed, shard by shard, and their digests, joined.
        classes: names of the classes.
    """
    pieces = [(split, items, digests) for split, shards in packed.items() for items, digests in shards]
    everything = [(split, item) for split, items, _ in pieces for item in items]
    values = np.frombuffer(bytes.fromhex("".join(digests for _, _, digests in pieces)), dtype=">u8")
    across: dict[tuple[str, str], list[str]] = defaultdict(list)
    mixed: list[str] = []
    for places in _groups(values):
        group = sorted((everything[place] for place in places), key=lambda one: (_ORDER.get(one[0], 0), one[1].name))
        first: dict[str, Item] = {}
        for split, item in group:
            for other_split, other in first.items():
                if other_split != split:
                    across[split, other_split].append(f"{item.name} is {other.name}")
            first.setdefault(split, item)
            if item.label != group[0][1].label:
                known = group[0][1]
                mixed.append(f"{item.name} ({classes[item.label]}) is {known.name} ({classes[known.label]})")
    notes = [
        f"{len(pairs):,} images of {split} are in {other} as well, byte for byte: {'; '.join(sorted(pairs)[:_LISTED])}"
        for (split, other), pairs in sorted(across.items())
    ]
    if mixed:
        notes.append(
            f"{len(mixed):,} images are in another class as well, byte for byte: {'; '.join(sorted(mixed)[:_LISTED])}"
        )
    return notes


def _groups(values: NDArray[np.uint64]) -> Iterator[list[int]]:
    """Yield the positions of equal values other than 0, which is a bad image's."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    edges = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1], [True])))
    for start, end in pairwise(edges.tolist()) if len(values) else ():
        if end - start > 1 and ordered[start]:
            yield order[start:end].tolist()
