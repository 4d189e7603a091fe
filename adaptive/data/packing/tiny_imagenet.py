"""Tiny-ImageNet-200, unpacked from tiny-imagenet-200.zip: train in class folders, val flat with a table of labels.

The labelled val images become split test, and training images are held out as split val: test has no labels.
"""

from __future__ import annotations

import re
from pathlib import Path

from adaptive.data.packing.folders.choices import FolderChoices
from adaptive.data.packing.folders.scan import NO_LABELS, FolderScan
from adaptive.data.packing.label_files import check_same_images, labelled, read_labels
from adaptive.data.packing.sources import Source, check_filled
from adaptive.errors import DataError

HOLD_OUT = 10_000
_HOLD_OUT_SHARE = 10  # at most this share of fewer images than the 100,000 that there should be

_TABLE = Path("val", "val_annotations.txt")
_LINE = re.compile(r"(?P<image>[^\t]+)\t(?P<name>n[0-9]{8})(?:\t|$)")


def is_download(root: Path) -> bool:
    """Say whether a folder is the unpacked download: val holds a table of labels and one folder with all images."""
    val = root / _TABLE.parent
    return (root / _TABLE).is_file() and [path.name for path in val.iterdir() if path.is_dir()] == ["images"]


def open_download(root: Path, choices: FolderChoices | None = None) -> Source:
    """List the images of the unpacked download (DataError: train is missing, or the labels are not val's)."""
    scan = FolderScan(root, choices)
    if not (root / "train").is_dir():
        raise DataError(f"{root} has {_TABLE} but no folder train; unpack tiny-imagenet-200.zip again")
    classes = scan.classes(root / "train")
    train = scan.class_images(root / "train", classes)
    images = list(scan.images(root / "val" / "images", 0))
    labels = read_labels(root / _TABLE, _LINE)
    check_same_images(labels, [Path(item.name).name for item in images], root / "val" / "images")
    test = sorted(labelled(images, labels, classes), key=lambda item: (item.label, item.name))
    splits = {"train": train, "test": test}
    check_filled(root, classes, splits)
    notes = ["the labelled val images are split test"]
    if (root / "test").is_dir():
        notes.append(f"{root / 'test'} has no labels and is left out")
        scan.tree.ignore_folder("test", NO_LABELS)
    scan.check_listed()
    count = min(HOLD_OUT, len(train) // _HOLD_OUT_SHARE, len(train) - len(classes))
    return Source(root, classes, splits, scan.left_out, count, [*notes, *scan.notes], frozenset({"train", "val"}))
