"""The splits of a source arranged as the flags say: which one is test, and how many training images become val."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive.data.packing.sources import Item, Source
from adaptive.data.packing.splitting.stratified import take
from adaptive.data.packing.splitting.twins import find_twins
from adaptive.errors import DataError

FLAGS = {"val": "--hold-out", "test": "--hold-out-test"}
DRAWS = {"val": 1, "test": 2}  # see `take`


def arrange_splits(source: Source, test_split: str | None, held_out: int | None, held_out_test: int, seed: int) -> None:
    """Name the test split and hold out images as the flags say, or as the source does where they say nothing.

    Which images become val does not depend on how many become test.

    Raises:
        DataError: a split is missing or there already, or too few training images to leave every class one.
    """
    if test_split is not None:
        _use_as_test(source, test_split)
    if held_out is None and source.hold_out:
        held_out, images = source.hold_out, len(source.splits["train"])
        source.notes.append(f"{held_out:,} of {images:,} training images are held out as split val (see --hold-out)")
    counts = {split: count for split, count in (("val", held_out), ("test", held_out_test)) if count}
    if counts:
        _hold_out(source, counts, seed)
    if "val" in source.splits and "test" not in source.splits:
        source.notes.append(
            "no split test: checkpoint and policy are chosen on val, so what is measured there promises too much; "
            "hold out images for a test with --hold-out-test M"
        )


def _use_as_test(source: Source, split: str) -> None:
    if split not in ("val", "test"):
        raise DataError(f"--test-split {split}: only val or test can become split test; give one of them")
    if split not in source.splits:
        names = ", ".join(sorted(source.splits))
        raise DataError(f"--test-split {split}: the source has no such split, it has {names}; leave the flag out")
    if "test" in source.splits and split != "test":
        raise DataError(f"--test-split {split}: the source has a test split besides; remove it, or leave the flag out")
    source.splits["test"] = source.splits.pop(split)


def _hold_out(source: Source, counts: dict[str, int], seed: int) -> None:
    """Move so many training images to new splits, one after another, each class in proportion to its size."""
    _check(source, counts)
    everything = source.splits["train"]
    twins = find_twins(source.root, everything)
    together = [[everything[place] for place in group] for place, group in (twins or {}).items() if place == group[0]]
    notes = []
    for split, count in counts.items():
        train = source.splits["train"]
        taken, rest = take(train, count, seed, FLAGS[split], _places(train, together), DRAWS[split])
        source.splits[split], source.splits["train"] = taken, rest
        if len(taken) < count:
            notes.append(f"{count - len(taken):,} fewer are held out for {split}")
    if twins is None:
        source.notes.append(
            "images were held out without looking for images with the same bytes: too many are of one size"
        )
    elif twins:
        source.notes.append(
            f"{len(twins):,} training images have the same bytes as another one; such images are held out together or "
            f"not at all" + (f", so that {' and '.join(notes)}" if notes else "")
        )


def _check(source: Source, counts: dict[str, int]) -> None:
    """Refuse what cannot be held out from a source (raises DataError)."""
    if "val" in counts and "val" in source.splits:
        raise DataError(
            f"--hold-out {counts['val']}: the source already has a val split; leave the flag out, or measure on that "
            "split at the end with --test-split val"
        )
    if "test" in counts and "test" in source.splits:
        raise DataError(f"--hold-out-test {counts['test']}: the source already has a test split; leave the flag out")
    images, classes = len(source.splits["train"]), len({item.label for item in source.splits["train"]})
    if len(counts) > 1 and sum(counts.values()) > images - classes:
        asked = " and ".join(f"{FLAGS[split]} {count}" for split, count in counts.items())
        raise DataError(
            f"{asked} are too many: of {images} training images every one of {classes} classes keeps at least one; "
            f"take {images - classes} or less together"
        )


def _places(items: Sequence[Item], together: Sequence[Sequence[Item]]) -> dict[int, list[int]]:
    """Return the positions of the images that stay together, by each of them, as far as they are among the items."""
    places = {id(item): place for place, item in enumerate(items)} if together else {}
    groups = ([places[id(item)] for item in group if id(item) in places] for group in together)
    return {place: group for group in groups for place in group}
