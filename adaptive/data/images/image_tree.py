"""Image files below a folder, found by name or content; links are followed, and what is left out is accounted for."""

from __future__ import annotations

import filecmp
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from adaptive.data.images.ignored import Ignored
from adaptive.data.images.image_kinds import (
    EXTENSIONS,
    HEAD_BYTES,
    NOT_AN_IMAGE,
    OF_A_TOOL,
    copied_name,
    extension_of,
    folder_left_behind,
    kind_of,
    left_behind,
    unread_kind,
)

LEFT_OUT = "left out as asked"
LOOSE = "image in no class folder"
SEEN_BEFORE = "link to a folder that is read already"
_DANGLING = "link that leads nowhere"
_EMPTY = "empty file"
NO_FILE = "no regular file"


class FoundImage(NamedTuple):
    """An image file: its path below the tree's root, with slashes, its size in bytes and modification time in ns."""

    name: str
    size: int
    changed: int


@dataclass
class ImageTree:
    """The image files below ``root``: those whose names say so, and others whose first bytes do.

    Attributes:
        root: the folder.
        leave_out: paths below it that are not read.
        ignored: the files that were met and are no images, or copies that tools made.
        unreadable: folders that could not be listed, with the reason: what is in them is unknown.
    """

    root: Path
    leave_out: Collection[str] = frozenset()
    ignored: Ignored = field(default_factory=Ignored)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def images(self, folder: str = "", deep: bool = True) -> Iterator[FoundImage]:
        """Yield the images of a folder below the root, at any depth or only its own.

        Those of a folder come sorted by name, before those of its folders. A folder that several links lead to is read
        once, and one that holds ``folder`` never: a link upwards would be endless, and mix classes.
        """
        seen = set(self._above(folder))
        pending = [folder]
        while pending:
            here = pending.pop()
            files, folders = self.listed(here)
            yield from self._images_of(here, files)
            for name in reversed(folders if deep else []):
                below = _join(here, name)
                if below in self.leave_out:
                    self.ignore_folder(below, LEFT_OUT)
                elif reason := folder_left_behind(name):
                    self.ignore_folder(below, reason)
                else:
                    pending.append(below)
            if pending:
                pending = self._unseen(pending, seen)

    def listed(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of a folder's files and folders, sorted; one that cannot be listed is noted.

        Raises:
            OSError: the root itself cannot be listed.
        """
        files: list[str] = []
        folders: list[str] = []
        try:
            with os.scandir(self.root / folder) as entries:
                for entry in entries:
                    (folders if _is_folder(entry) else files).append(entry.name)
        except OSError as error:
            if not folder:
                raise
            self.unreadable.append((folder, error.strerror or str(error)))
            return [], []
        return sorted(files), sorted(folders)

    def ignore_folder(self, folder: str, reason: str) -> None:
        """Count all files of a folder as left out; links in it are not followed."""
        for parent, _, names in os.walk(self.root / folder):
            inside = Path(parent).relative_to(self.root).as_posix()
            for name in names:
                self.ignored.add(reason, f"{inside}/{name}")

    def _above(self, folder: str) -> Iterator[tuple[int, int]]:
        parts = folder.split("/") if folder else []
        for depth in range(len(parts) + 1):
            try:
                status = os.stat(self.root.joinpath(*parts[:depth]))  # noqa: PTH116
            except OSError:
                continue
            yield status.st_dev, status.st_ino

    def _unseen(self, pending: list[str], seen: set[tuple[int, int]]) -> list[str]:
        """Drop from the end of a list the folders that were seen, and enter the first other one."""
        while pending:
            try:
                status = os.stat(self.root / pending[-1])  # noqa: PTH116
            except OSError:
                return pending  # listing it will say why
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                return pending
            self.ignored.add(SEEN_BEFORE, pending.pop())
        return pending

    def is_image(self, path: str) -> bool:
        """Say whether a file, given by its path below the root, is an image; count it as left out otherwise."""
        return self._image(path) is not None

    def _images_of(self, folder: str, names: list[str]) -> Iterator[FoundImage]:
        present = set(names)
        for name in names:
            path = _join(folder, name)
            if path in self.leave_out:
                self.ignored.add(LEFT_OUT, path)
            elif image := self._image(path):
                original = copied_name(name)
                if original in present and self._are_equal(path, _join(folder, original)):
                    self.ignored.add(f"copy of a file beside it ({OF_A_TOOL})", path)
                else:
                    yield image

    def _image(self, path: str) -> FoundImage | None:
        """Return a file if it is an image; one that is called so and cannot be read is returned with size 0."""
        name = path.rpartition("/")[2]
        if reason := left_behind(name):
            self.ignored.add(reason, path)
            return None
        named_so = extension_of(name) in EXTENSIONS
        try:
            status = os.stat(self.root / path)  # noqa: PTH116
        except OSError as error:
            if named_so:
                return FoundImage(path, 0, 0)  # reading it fails with the reason
            dangling = isinstance(error, FileNotFoundError)
            self.ignored.add(_DANGLING if dangling else f"cannot be read: {error.strerror}", path)
            return None
        if not stat.S_ISREG(status.st_mode):
            self.ignored.add(NO_FILE, path)  # to open a pipe would wait for ever
            return None
        if not named_so and (other := self._reason(path, name, status.st_size)):
            self.ignored.add(other, path)
            return None
        return FoundImage(path, status.st_size, status.st_mtime_ns)

    def _reason(self, path: str, name: str, size: int) -> str | None:
        """Return why a file with another name than an image's is none, None where its first bytes are an image's."""
        if size == 0:
            return _EMPTY
        try:
            with (self.root / path).open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        unread, kind = unread_kind(name, head), kind_of(head)
        if kind and not (kind == "TIFF" and unread):  # camera raw files begin as TIFF does
            return None
        return f"image of a kind that is not read ({unread}), convert it" if unread else NOT_AN_IMAGE

    def _are_equal(self, one: str, other: str) -> bool:
        try:
            # Not by filecmp's memory: it goes by size and time, and files change.
            filecmp.clear_cache()
            return filecmp.cmp(self.root / one, self.root / other, shallow=False)
        except OSError:
            return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed: reading it will say why
        return False


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
