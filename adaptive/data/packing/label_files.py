"""Text files that name the class of every image: `image class ...`, one image a line."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from adaptive.data.packing.sources import Item
from adaptive.errors import DataError

_SHOWN = 60  # characters of a bad line


@dataclass(frozen=True)
class Labels:
    """The class name of every image by its file name, and the file that they were read from."""

    file: Path
    classes: dict[str, str]


def read_labels(path: Path, line: re.Pattern[str], header: str | None = None) -> Labels:
    """Read a file whose lines match ``line``, with groups ``image`` and ``name``; empty lines and a header are skipped.

    Raises:
        DataError: a line does not match, or an image has two classes.
        OSError: the file cannot be read.
    """
    classes: dict[str, str] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not text.strip() or (number == 1 and text.strip() == header):
            continue
        found = line.match(text)
        if not found:
            raise DataError(
                f"{path}, line {number}: {text[:_SHOWN]!r} is not an image and its class; download it again"
            )
        image, name = found["image"], found["name"]
        if classes.setdefault(image, name) != name:
            raise DataError(f"{path}, line {number}: {image} is {name}, and {classes[image]} before; download it again")
    return Labels(path, classes)


def check_same_images(labels: Labels, images: Collection[str], where: Path) -> None:
    """Check that the labelled images are the ones of the source, all of them (raises DataError)."""
    for kind, names in (
        ("lacks", sorted(set(images) - set(labels.classes))),
        ("names", sorted(set(labels.classes) - set(images))),
    ):
        if names:
            verb = "that are in" if kind == "lacks" else "that are not in"
            raise DataError(
                f"{labels.file} {kind} {len(names)} of {max(len(images), len(labels.classes))} images {verb} {where}: "
                f"{', '.join(names[:5])}; one of the two is incomplete, download it again"
            )


def labelled(items: Collection[Item], labels: Labels, classes: list[str]) -> list[Item]:
    """Return the items with labels by their file names (DataError: a class that is not one of ``classes``)."""
    numbers = {name: label for label, name in enumerate(classes)}
    for image, name in labels.classes.items():
        if name not in numbers:
            raise DataError(
                f"{labels.file}: {image} is of class {name}, which the training images lack; "
                "add its training images, or remove the image and its line"
            )
    return [replace(item, label=numbers[labels.classes[PurePath(item.name).name]]) for item in items]
