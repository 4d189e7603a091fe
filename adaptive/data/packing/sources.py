"""Sources: the images to pack by split and class, and the data set that comes with a library."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from adaptive.data.images.ignored import Ignored
from adaptive.data.images.image_kinds import EXTENSIONS
from adaptive.data.packing.splitting.stratified import take
from adaptive.errors import DataError, MachineError

_DIGITS_TEST, _DIGITS_VAL = 300, 200


@dataclass(frozen=True, slots=True)
class Item:
    """An image to pack: its name (its path in class folders), label, size in bytes, and the location of its bytes."""

    name: str
    label: int
    size: int
    changed: int = 0  # modification time in ns
    data: bytes | None = None
    path: str | None = None  # of the file with its bytes, below the source's root; the name when None
    offset: int | None = None  # of its first byte in that file; all of the file when None


@dataclass
class Source:
    """All images to pack, by split, in sorted order; they are shuffled later.

    ``left_out`` accounts for the files that are not packed; ``hold_out`` is how many training images become split val
    unless the user says otherwise; ``notes`` are sentences for the summary; ``folders`` are those below the root that
    are splits.
    """

    root: Path | None
    classes: list[str]
    splits: dict[str, list[Item]]
    left_out: Ignored = field(default_factory=Ignored)
    hold_out: int = 0
    notes: list[str] = field(default_factory=list)
    folders: frozenset[str] = frozenset()

    @property
    def ignored(self) -> int:
        """Number of files that are not packed."""
        return self.left_out.total


def read_item(root: Path | None, item: Item) -> bytes:
    """Return the bytes of an image, fewer than its size where its archive ends early (raises OSError)."""
    if item.data is not None:
        return item.data
    assert root is not None
    with (root / (item.path or item.name)).open("rb") as stream:
        if item.offset is None:
            return stream.read()
        stream.seek(item.offset)
        return stream.read(item.size)


def check_filled(root: Path, classes: list[str], splits: dict[str, list[Item]]) -> None:
    """Check that every class has a training image and every split an image (raises DataError)."""
    if not splits["train"]:
        raise DataError(f"{root} holds no images ({', '.join(sorted(EXTENSIONS))}) for training; check the path")
    counts = Counter(item.label for item in splits["train"])
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(classes)} classes in {root} have no training image: {', '.join(empty[:5])}; "
            "add images, remove the folders, or leave them out with --leave-out PATH"
        )
    for split, items in splits.items():
        if not items:
            raise DataError(f"split {split} of {root} holds no images; fill or remove its folder")


def open_builtin(name: str) -> Source:
    """Return the data set that comes with a library (DataError: unknown; MachineError: it is not installed)."""
    if name != "builtin:digits":
        raise DataError(f"source {name} is unknown; the only builtin one is builtin:digits")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MachineError("builtin:digits needs scikit-learn; install it with: pip install scikit-learn") from None
    digits = load_digits()
    items = []
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        stream = io.BytesIO()
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(stream, "png")
        items.append(Item(f"digits/{number:04d}.png", int(label), stream.tell(), data=stream.getvalue()))
    test, rest = take(items, _DIGITS_TEST, 0, name)
    val, train = take(rest, _DIGITS_VAL, 0, name)
    return Source(None, [str(n) for n in digits.target_names], {"train": train, "val": val, "test": test})
