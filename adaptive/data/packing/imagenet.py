"""ImageNet (ILSVRC 2012) from a download: the archives of image-net.org, or Kaggle's folders with a flat val.

Papers report accuracy on the labelled validation images, so these become split test, and 50,000 training images are
held out as split val. Classes are WordNet IDs (WNIDs) in sorted order, the order of every published network. Items are
named as in class folders, train/n01440764/... and val/n01440764/...: packing either form gives the same dataset.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from adaptive.data.images.image_kinds import NOT_AN_IMAGE, is_image, left_behind
from adaptive.data.images.image_tree import NO_FILE
from adaptive.data.packing.archives import Member, list_members
from adaptive.data.packing.folders.choices import FolderChoices
from adaptive.data.packing.folders.scan import NO_LABELS, FolderScan
from adaptive.data.packing.imagenet_labels import IMAGE, validation_labels
from adaptive.data.packing.label_files import labelled
from adaptive.data.packing.sources import Item, Source, check_filled
from adaptive.errors import DataError

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
HOLD_OUT = 50_000
# Of an archive with fewer images than ILSVRC's 1,281,167, at most this share is held out.
_HOLD_OUT_SHARE = 25

_KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")
_NO_CLASS_ARCHIVE = "no archive of a class"
_NO_VALIDATION_IMAGE = "not named as a validation image is"
_CLASS_ARCHIVE = re.compile(r"(n[0-9]{8})\.tar")


def is_download(root: Path) -> bool:
    """Say whether a folder holds an ImageNet download: one of its archives, or Kaggle's folders."""
    base = _base(root)
    return base != root or any((root / name).is_file() for name in (TRAIN, VALIDATION)) or _is_flat(root / "val")


def open_download(root: Path, choices: FolderChoices | None = None) -> Source:
    """List the images of an ImageNet download; archives are read by offset and not unpacked.

    Raises:
        DataError: the training images are missing, an archive is damaged, or the validation images' labels are missing
            or not theirs.
        MachineError: the devkit has to be read and scipy is not installed.
    """
    base = _base(root)
    scan = FolderScan(base, choices)
    if (base / TRAIN).is_file():
        classes, train = _archived_train(base / TRAIN, scan)
    elif (base / "train").is_dir():
        classes = scan.classes(base / "train")
        train = scan.class_images(base / "train", classes)
        scan.count_loose(base / "train")
    else:
        raise DataError(f"{base} has neither {TRAIN} nor a folder train; put the training images there")
    splits = {"train": train}
    notes = []
    if (base / VALIDATION).is_file():
        splits["test"] = _with_labels(root, _archived_validation(base / VALIDATION, scan), classes, base / VALIDATION)
    elif _is_flat(base / "val"):
        splits["test"] = _with_labels(root, _flat_validation(base / "val", scan), classes, base / "val")
    elif (base / "val").is_dir():
        splits["test"] = scan.class_images(base / "val", classes)
        scan.count_loose(base / "val")
    if "test" in splits:
        notes.append("the validation images are split test")
    else:
        notes.append(f"there is no {VALIDATION}, so there is no split test")
    if (base / "test").is_dir():
        notes.append(f"{base / 'test'} has no labels and is left out")
        scan.tree.ignore_folder("test", NO_LABELS)
    scan.check_listed()
    check_filled(base, classes, splits)
    count = min(HOLD_OUT, len(train) // _HOLD_OUT_SHARE, len(train) - len(classes))
    return Source(base, classes, splits, scan.left_out, count, [*notes, *scan.notes], frozenset({"train", "val"}))


def _base(root: Path) -> Path:
    """Return the folder of the images: Kaggle's are three levels below their label file."""
    return root / _KAGGLE if (root / _KAGGLE / "train").is_dir() else root


def _is_flat(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with os.scandir(folder) as entries:
        return any(IMAGE.fullmatch(entry.name) for entry in entries)


def _archived_train(archive: Path, scan: FolderScan) -> tuple[list[str], list[Item]]:
    members, ignored = list_members(archive)
    inner = {found[1]: member for member in members if (found := _CLASS_ARCHIVE.fullmatch(member.name))}
    scan.ignore([_inside(archive, name) for name in ignored], NO_FILE)
    others = [_inside(archive, member.name) for member in members if not _CLASS_ARCHIVE.fullmatch(member.name)]
    scan.ignore(others, _NO_CLASS_ARCHIVE)
    if not inner:
        raise DataError(f"{archive} holds no class archives like n01440764.tar; download it again from image-net.org")
    changed = archive.stat().st_mtime_ns
    classes = sorted(inner)
    items = []
    for label, wnid in enumerate(classes):
        images, ignored = list_members(archive, inner[wnid])
        where = f"{archive.name}/{wnid}.tar"
        scan.ignore([f"{where}/{name}" for name in ignored], NO_FILE)
        for member in sorted(images, key=lambda member: member.name):
            if is_image(member.name):
                items.append(_item(f"train/{wnid}/{member.name}", label, member, archive, changed))
            else:
                scan.ignore([f"{where}/{member.name}"], left_behind(member.name) or NOT_AN_IMAGE)
    return classes, items


def _archived_validation(archive: Path, scan: FolderScan) -> list[Item]:
    members, ignored = list_members(archive)
    images = [member for member in members if IMAGE.fullmatch(member.name)]
    scan.ignore([_inside(archive, name) for name in ignored], NO_FILE)
    others = [_inside(archive, member.name) for member in members if not IMAGE.fullmatch(member.name)]
    scan.ignore(others, _NO_VALIDATION_IMAGE)
    if not images:
        raise DataError(f"{archive} holds no images like ILSVRC2012_val_00000001.JPEG; download it again")
    changed = archive.stat().st_mtime_ns
    return [_item(member.name, 0, member, archive, changed) for member in images]


def _flat_validation(folder: Path, scan: FolderScan) -> list[Item]:
    items = []
    for path in sorted(folder.iterdir()):
        if IMAGE.fullmatch(path.name) and path.is_file():
            status = path.stat()
            items.append(Item(path.name, 0, status.st_size, status.st_mtime_ns, path=f"val/{path.name}"))
        else:
            scan.ignore([f"val/{path.name}"], _NO_VALIDATION_IMAGE)
    return items


def _inside(archive: Path, name: str) -> str:
    return f"{archive.name}/{name}"


def _with_labels(root: Path, items: list[Item], classes: list[str], where: Path) -> list[Item]:
    labels = validation_labels(root, [item.name for item in items], where)
    named = [replace(item, name=f"val/{classes[item.label]}/{item.name}") for item in labelled(items, labels, classes)]
    return sorted(named, key=lambda item: (item.label, item.name))


def _item(name: str, label: int, member: Member, archive: Path, changed: int) -> Item:
    return Item(name, label, member.size, changed, path=archive.name, offset=member.offset)
