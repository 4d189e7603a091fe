"""A choice of images that holds the same share of every class; images of the same bytes stay together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from adaptive.errors import DataError


class Labelled(Protocol):
    """Something of a class."""

    @property
    def label(self) -> int:
        """Number of its class."""


LabelledItem = TypeVar("LabelledItem", bound=Labelled)


def take(
    items: list[LabelledItem],
    count: int,
    seed: int,
    flag: str,
    twins: Mapping[int, Sequence[int]] | None = None,
    draw: int = 1,
) -> tuple[list[LabelledItem], list[LabelledItem]]:
    """Return ``count`` images, each class in proportion to its size, and the others; fewer where twins forbid it.

    Args:
        items: the images.
        count: how many to take; every class keeps one at least.
        seed: of the choice.
        flag: what asks for them, for messages.
        twins: positions of images with the same bytes, by each of these: they are taken all or not at all.
        draw: number of the choice: of one seed two of them know nothing of each other.

    Raises:
        DataError: there are too few images.
    """
    sizes = Counter(item.label for item in items)
    if count > len(items) - len(sizes):
        raise DataError(
            f"{flag} {count} is too many: of {len(items)} training images every one of {len(sizes)} classes keeps "
            f"at least one; take {len(items) - len(sizes)} or less"
        )
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed], spawn_key=(draw,))))
    seen: Counter[int] = Counter()
    ranks = np.empty(len(items))
    # Ordered by an image's random rank in its class, divided by the size of the class, the first ``count`` images hold
    # an equal share of every class; the last image of each is kept.
    for number in generator.permutation(len(items)):
        label = items[number].label
        seen[label] += 1
        last = seen[label] == sizes[label]
        ranks[number] = np.inf if last else (seen[label] - generator.random()) / sizes[label]
    taken = _first(np.argsort(ranks, kind="stable").tolist(), ranks, count, twins or {})
    return [i for n, i in enumerate(items) if n in taken], [i for n, i in enumerate(items) if n not in taken]


def _first(order: list[int], ranks: np.ndarray, count: int, twins: Mapping[int, Sequence[int]]) -> set[int]:
    taken: set[int] = set()
    for number in order:
        if len(taken) == count or np.isinf(ranks[number]):
            break
        group = twins.get(number, (number,))
        if number not in taken and len(group) <= count - len(taken) and np.isfinite(ranks[list(group)]).all():
            taken.update(group)
    return taken
