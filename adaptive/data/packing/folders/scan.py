"""A walk over class folders: the classes, and the images of each, with an account of all that is left out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from adaptive.data.images.image_kinds import folder_left_behind
from adaptive.data.images.image_tree import LEFT_OUT, LOOSE, ImageTree
from adaptive.data.packing.folders.choices import FolderChoices
from adaptive.data.packing.folders.questions import (
    check_class_names,
    check_nesting,
    check_sibling,
    check_split_names,
    listed,
    match_classes,
)
from adaptive.data.packing.sources import Item, Source, check_filled
from adaptive.errors import DataError

NO_LABELS = "in a split without labels"
_BESIDE = "beside the splits"


def open_folder(root: Path, choices: FolderChoices) -> Source:
    """List the images of a folder of class folders, or of folders for splits that hold them.

    Raises:
        DataError: there are no images, a training class is empty, another split has classes that train lacks, a folder
            cannot be listed, or the folders can be read in several ways and no flag says which.
    """
    scan = FolderScan(root, choices)
    folders = scan.split_folders()
    classes = scan.classes(folders["train"])
    splits = {split: scan.class_images(folder, classes, split) for split, folder in folders.items()}
    for split, folder in folders.items():
        scan.count_loose(folder, split if folder != root else None)
    scan.check_listed()
    check_filled(root, classes, splits)
    if not (choices.classes_as_named or choices.no_splits):
        scan.notes += scan.check_nesting(folders["train"], splits["train"])
    scan.note_empty(splits, classes)
    return Source(root, classes, splits, scan.left_out, notes=scan.notes, folders=scan.split_names)


class FolderScan:
    """A walk over a source folder: lists its images by class, and accounts for the files that are not images.

    Attributes:
        left_out: the account.
        notes: sentences for the summary.
        split_names: names of the folders that are splits.
    """

    def __init__(self, root: Path, choices: FolderChoices | None = None) -> None:
        self.root = root
        self.choices = choices or FolderChoices()
        self.tree = ImageTree(root, self.choices.leave_out)
        self.left_out = self.tree.ignored
        self.notes: list[str] = []
        self.split_names: frozenset[str] = frozenset()
        self._loose_in: dict[Path, list[str]] = {}
        self._ignored: set[str] = set()

    def split_folders(self) -> dict[str, Path]:
        """Map split names to their folders; without folders called like splits the source itself is train."""
        names = self.subfolders(self.root)
        found = {} if self.choices.no_splits else check_split_names(self.root, names)
        if not found:
            return {"train": self.root}
        self.split_names = frozenset(found.values())
        for name in names:
            if name not in self.split_names:
                classes = self.subfolders(self.root / found["train"])
                if inside := self._with_images(name):
                    check_sibling(self.root, found.values(), name, inside, classes)
                    self.notes.append(f"the images in {name} are of no split and are left out")
                self.tree.ignore_folder(name, _BESIDE)
        self.count_loose(self.root)
        if renamed := [f"{name} is split {split}" for split, name in found.items() if name != split]:
            self.notes.append(", ".join(renamed))
        return {split: self.root / name for split, name in found.items()}

    def subfolders(self, folder: Path) -> list[str]:
        """Return the names of the folders in a folder, sorted, without those that tools made or a flag leaves out."""
        found = []
        below = self._below(folder)
        _, names = self.tree.listed(below)
        for name in names:
            path = f"{below}/{name}" if below else name
            if path in self.choices.leave_out:
                self._ignore_once(path, LEFT_OUT)
            elif reason := folder_left_behind(name):
                self._ignore_once(path, reason)
            else:
                found.append(name)
        for name in found:
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                raise DataError(f"folder {os.fsencode(name)!r} in {folder} is not UTF-8; rename it") from None
        return found

    def classes(self, folder: Path) -> list[str]:
        """Return the names of a training folder's class folders, sorted.

        Raises:
            DataError: there are none, or two are the same but for case or accents.
        """
        names = self.subfolders(folder)
        if not names:
            self.check_listed()
            loose = self._loose(folder)
            there = f"; {len(loose)} images lie in it unsorted ({loose[0]})" if loose else ""
            raise DataError(f"{folder} holds no class folders{there}; put each class's images in a folder of its name")
        if not self.choices.classes_as_named:
            check_class_names(folder, names)
        return names

    def class_images(self, folder: Path, classes: list[str], split: str = "val") -> list[Item]:
        """Return the images below a split's class folders, class by class.

        Raises:
            DataError: a folder is not one of ``classes``, or there is none but images that lie unsorted.
        """
        names = self.subfolders(folder)
        if not names and (loose := self._loose(folder)):
            raise DataError(
                f"split {split}: {folder} holds {len(loose)} images that are not sorted into class folders "
                f"({loose[0]}); sort them as in train, or leave them out with --leave-out {folder.name}"
            )
        labels = match_classes(split, folder, names, classes)
        if otherwise := [name for name in names if classes[labels[name]] != name]:
            self.notes.append(
                f"{len(otherwise)} class folders of {folder.name} compose accents otherwise than train's, and are the "
                f"same classes: {listed(otherwise)}"
            )
        return [item for name in names for item in self.images(folder / name, labels[name])]

    def count_loose(self, folder: Path, split: str | None = None) -> None:
        """Account for the files beside class or split folders: they belong to no class."""
        loose = self._loose(folder)
        for name in loose:
            self.left_out.add(LOOSE, name)
        if loose:
            where = f"split {split}" if split else str(folder)
            self.notes.append(f"{len(loose):,} images of {where} lie in no class folder and are left out: {loose[0]}")

    def images(self, folder: Path, label: int) -> Iterator[Item]:
        """Yield the images below a class folder; those of a folder sorted by name, before those of its folders."""
        for image in self.tree.images(self._below(folder)):
            yield Item(image.name, label, image.size, image.changed)

    def ignore(self, names: Sequence[str], reason: str) -> None:
        """Account for members of an archive that are left out."""
        for name in names:
            self.left_out.add(reason, name)

    def check_listed(self) -> None:
        """Refuse a source of which a folder could not be listed: nobody knows what is in it (raises DataError)."""
        if self.tree.unreadable:
            shown = [f"{name}: {reason}" for name, reason in self.tree.unreadable]
            raise DataError(
                f"{len(shown)} folders in {self.root} cannot be listed ({listed(shown)}); mend their permissions, or "
                f"leave them out with --leave-out {self.tree.unreadable[0][0]}"
            )

    def check_nesting(self, folder: Path, items: list[Item]) -> list[str]:
        """Look for classes that lie deeper than the class folders do, as `questions.check_nesting` says."""
        above = self._below(folder)
        depth = above.count("/") + 1 if above else 0
        inside: dict[str, Counter[str]] = {}
        for item in items:
            parts = item.name.split("/", depth + 2)[depth:]
            inside.setdefault(parts[0], Counter())[parts[1] if len(parts) > 2 else ""] += 1
        return check_nesting(folder, {name: dict(counts) for name, counts in inside.items()})

    def note_empty(self, splits: dict[str, list[Item]], classes: list[str]) -> None:
        """Note of every split which classes it has no image of."""
        for split, items in splits.items():
            present = {item.label for item in items}
            if items and (absent := [name for label, name in enumerate(classes) if label not in present]):
                self.notes.append(
                    f"split {split} has no image of {len(absent)} of {len(classes)} classes: {listed(absent)}"
                )

    def _loose(self, folder: Path) -> list[str]:
        """Return the images that lie in a folder itself; its other files are accounted for at the first call."""
        if folder not in self._loose_in:
            self._loose_in[folder] = [image.name for image in self.tree.images(self._below(folder), deep=False)]
        return self._loose_in[folder]

    def _with_images(self, name: str) -> list[str]:
        """Return which folders of a folder hold images, "" for itself; their files are accounted for elsewhere."""
        other = ImageTree(self.root, self.choices.leave_out)
        inside = [below for below in other.listed(name)[1] if not folder_left_behind(below)]
        found = [below for below in inside if any(True for _ in other.images(f"{name}/{below}"))]
        self.tree.unreadable += other.unreadable
        return found + ([""] if any(True for _ in other.images(name, deep=False)) else [])

    def _below(self, folder: Path) -> str:
        return "" if folder == self.root else folder.relative_to(self.root).as_posix()

    def _ignore_once(self, path: str, reason: str) -> None:
        if path not in self._ignored:
            self._ignored.add(path)
            self.tree.ignore_folder(path, reason)
