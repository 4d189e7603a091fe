"""The splits of a source arranged as the flags say: which one is test, and how many training images become val."""

from __future__ import annotations

from adaptive.data.packing.sources import Source
from adaptive.data.packing.splitting.stratified import take
from adaptive.data.packing.splitting.twins import find_twins
from adaptive.errors import DataError


def arrange_splits(source: Source, test_split: str | None, held_out: int | None, seed: int) -> None:
    """Name the test split and hold out images as the flags say, or as the source does where they say nothing.

    Raises:
        DataError: a split is missing or there already, or too few training images to leave every class one.
    """
    if test_split is not None:
        _use_as_test(source, test_split)
    if held_out is None and source.hold_out:
        held_out, images = source.hold_out, len(source.splits["train"])
        source.notes.append(f"{held_out:,} of {images:,} training images are held out as split val (see --hold-out)")
    if held_out:
        _hold_out(source, held_out, seed)


def _use_as_test(source: Source, split: str) -> None:
    if split not in ("val", "test"):
        raise DataError(f"--test-split {split}: only val or test can become split test; give one of them")
    if split not in source.splits:
        names = ", ".join(sorted(source.splits))
        raise DataError(f"--test-split {split}: the source has no such split, it has {names}; leave the flag out")
    if "test" in source.splits and split != "test":
        raise DataError(f"--test-split {split}: the source has a test split besides; remove it, or leave the flag out")
    source.splits["test"] = source.splits.pop(split)


def _hold_out(source: Source, count: int, seed: int) -> None:
    """Move ``count`` training images to a new split val, each class in proportion to its size."""
    if "val" in source.splits:
        raise DataError(
            f"--hold-out {count}: the source already has a val split; leave the flag out, or measure on that split "
            "at the end with --test-split val"
        )
    train = source.splits["train"]
    twins = find_twins(source.root, train)
    source.splits["val"], source.splits["train"] = take(train, count, seed, "--hold-out", twins)
    if twins is None:
        source.notes.append(
            "images were held out without looking for images with the same bytes: too many are of one size"
        )
    elif twins:
        short = count - len(source.splits["val"])
        source.notes.append(
            f"{len(twins):,} training images have the same bytes as another one; such images are held out together or "
            f"not at all" + (f", so that {short:,} fewer are held out" if short else "")
        )
