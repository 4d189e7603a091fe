"""Sources: the images to pack by split and class, read from class folders or built in, and the hold-out."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from adaptive.data.images.image_files import EXTENSIONS, files_below, is_image
from adaptive.errors import DataError, MachineError

_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
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

    ``hold_out`` is how many training images become split val unless the user says otherwise; ``notes`` are sentences
    for the summary.
    """

    root: Path | None
    classes: list[str]
    splits: dict[str, list[Item]]
    ignored: int = 0
    hold_out: int = 0
    notes: list[str] = field(default_factory=list)


def open_folder(root: Path) -> Source:
    """List the images of a folder of class folders, optionally below train/, val/ (or validation/) and test/.

    Raises:
        DataError: there are no images, a training class is empty, or another split has classes that train lacks.
    """
    scan = FolderScan(root)
    folders = scan.split_folders()
    classes = scan.classes(folders["train"])
    splits = {split: scan.class_images(folder, classes) for split, folder in folders.items()}
    for folder in {root, *folders.values()}:
        scan.count_loose(folder)
    check_filled(root, classes, splits)
    return Source(root, classes, splits, scan.ignored)


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
    source.splits["val"], source.splits["train"] = _take(source.splits["train"], count, seed, "--hold-out")


def _take(items: list[Item], count: int, seed: int, flag: str) -> tuple[list[Item], list[Item]]:
    sizes = Counter(item.label for item in items)
    if count > len(items) - len(sizes):
        raise DataError(
            f"{flag} {count} is too many: of {len(items)} training images every one of {len(sizes)} classes keeps "
            f"at least one; take {len(items) - len(sizes)} or less"
        )
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed], spawn_key=(1,))))
    seen: Counter[int] = Counter()
    ranks = np.empty(len(items))
    # Ordered by an image's random rank in its class, divided by the size of the class, the first ``count`` images hold
    # an equal share of every class; the last image of each is kept.
    for number in generator.permutation(len(items)):
        label = items[number].label
        seen[label] += 1
        last = seen[label] == sizes[label]
        ranks[number] = np.inf if last else (seen[label] - generator.random()) / sizes[label]
    taken = set(np.argsort(ranks, kind="stable")[:count].tolist())
    return [i for n, i in enumerate(items) if n in taken], [i for n, i in enumerate(items) if n not in taken]


@dataclass
class FolderScan:
    """A walk over a source folder: lists its images by class, and counts the files that are not images."""

    root: Path
    ignored: int = field(default=0)

    def split_folders(self) -> dict[str, Path]:
        """Map split names to their folders; without a train folder the source itself is train."""
        found = {p.name: p for p in self.subfolders(self.root)}
        splits = [name for name in found if name in _SPLIT_FOLDERS]
        if "train" not in found:
            if splits and len(splits) == len(found):
                raise DataError(f"{self.root} has {', '.join(splits)} but no train folder; add it, or rename one")
            return {"train": self.root}
        if {"val", "validation"} <= set(splits):
            raise DataError(f"{self.root} has both val and validation; keep one of them")
        for name in set(found) - set(splits):
            self.ignored += sum(1 for _ in files_below(found[name]))
        return {_SPLIT_FOLDERS[name]: found[name] for name in splits}

    def subfolders(self, folder: Path) -> list[Path]:
        """Return the visible sub-folders by name."""
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        folders = [p for p in entries if p.is_dir()]
        for path in folders:
            try:
                path.name.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(f"folder {os.fsencode(path.name)!r} in {folder} is not UTF-8; rename it") from None
        return folders

    def classes(self, folder: Path) -> list[str]:
        """Return the names of a training folder's class folders, sorted (DataError when there are none)."""
        if names := [path.name for path in self.subfolders(folder)]:
            return names
        raise DataError(f"{folder} holds no class folders; put each class's images in a folder of its name")

    def class_images(self, folder: Path, classes: list[str]) -> list[Item]:
        """Return the images below a split's class folders (DataError when a folder is not one of ``classes``)."""
        labels = {name: label for label, name in enumerate(classes)}
        names = [path.name for path in self.subfolders(folder)]
        if strange := [name for name in names if name not in labels]:
            raise DataError(
                f"{folder} has {len(strange)} classes that train lacks: {', '.join(strange[:5])}; "
                "remove them or add training images"
            )
        return [item for name in names for item in self.images(folder / name, labels[name])]

    def count_loose(self, folder: Path) -> None:
        """Count the files beside class or split folders: they belong to no class."""
        self.ignored += sum(1 for path in folder.iterdir() if not path.is_dir())

    def images(self, folder: Path, label: int) -> Iterator[Item]:
        """Yield the images below a class folder, sorted by path."""
        for path in files_below(folder):
            if not is_image(path.name):
                self.ignored += 1
                continue
            name = path.relative_to(self.root).as_posix()
            try:
                status = path.stat()
            except OSError:  # a dangling link; reading it fails later, and it counts as a bad image
                yield Item(name, label, 0)
            else:
                yield Item(name, label, status.st_size, status.st_mtime_ns)


def check_filled(root: Path, classes: list[str], splits: dict[str, list[Item]]) -> None:
    """Check that every class has a training image and every split an image (raises DataError)."""
    if not splits["train"]:
        raise DataError(f"{root} holds no images ({', '.join(sorted(EXTENSIONS))}) for training; check the path")
    counts = Counter(item.label for item in splits["train"])
    empty = [name for label, name in enumerate(classes) if not counts[label]]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(classes)} classes in {root} have no training image: {', '.join(empty[:5])}; "
            "add images or remove the folders"
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
    test, rest = _take(items, _DIGITS_TEST, 0, name)
    val, train = _take(rest, _DIGITS_VAL, 0, name)
    return Source(None, [str(n) for n in digits.target_names], {"train": train, "val": val, "test": test})
