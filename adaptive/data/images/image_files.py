"""Image files: those that a command line names (files, folders, patterns, stdin), and those below a folder."""

from __future__ import annotations

import codecs
import glob
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from adaptive.data.images.decode import decode_image
from adaptive.data.images.ignored import Ignored
from adaptive.data.images.image_kinds import EXTENSIONS, HEAD_BYTES, kind_of, unread_kind
from adaptive.data.images.image_tree import ImageTree
from adaptive.errors import DataError

STDIN = "-"
_LISTED = 5  # kinds of other files that a message lists
_SHOWN = 200  # characters of a name that leads nowhere
LARGEST_IMAGE = 1 << 30  # bytes of an image from stdin: more than the largest that is decoded has, uncompressed
LONGEST_LIST = 1 << 26  # bytes of a list from stdin: half a million names of usual length


@dataclass(frozen=True)
class ImageFile:
    """An image by its name, with its bytes where they came from stdin."""

    name: str
    content: bytes | None = None

    def open(self) -> Image.Image:
        """Return the image, upright and in RGB (raises DataError with its name and the reason)."""
        try:
            return decode_image(Path(self.name).read_bytes() if self.content is None else self.content)
        except OSError as error:
            raise DataError(f"{self.name}: {error.strerror or error}; check the path and its permissions") from None
        except DataError as error:
            raise DataError(f"{self.name}: {error}") from None


@dataclass
class Skipped:
    """What a search for images passed over: files by kind, and folders that could not be listed, with the reason."""

    files: Ignored = field(default_factory=Ignored)
    folders: list[str] = field(default_factory=list)


def find_images(names: Iterable[str], stdin: BinaryIO, skipped: Skipped | None = None) -> list[ImageFile]:
    """Return the images that a command line names, in that order; those of a folder or pattern sorted by path.

    Args:
        names: files, folders (searched to any depth for image files), patterns (``**`` reaches any depth), and ``-``
            for the standard input: one image, or names of files, one a line.
        stdin: read if ``-`` is among the names.
        skipped: takes what folders and patterns hold besides images.

    Raises:
        DataError: a name leads to no file, a folder or pattern to no image.
    """
    found: list[ImageFile] = []
    skipped = skipped or Skipped()
    for name in names:
        if name == STDIN:
            found += _from_stdin(stdin, skipped)
        # Not by Path, which raises an error where a name is too long for the file system.
        elif os.path.isdir(name):  # noqa: PTH112
            found += _from_folder(name, skipped)
        elif os.path.exists(name):  # noqa: PTH110
            found.append(ImageFile(name))
        elif glob.has_magic(name):
            found += _from_pattern(name, skipped)
        else:
            shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}... ({len(name)} characters)"
            raise DataError(f"image {shown} does not exist; give files, folders, patterns in quotes, or - for stdin")
    return found


def _from_folder(name: str, skipped: Skipped) -> list[ImageFile]:
    tree = ImageTree(Path(name))
    try:
        below = [ImageFile(str(Path(name, image.name))) for image in tree.images()]
    except OSError as error:
        raise DataError(f"folder {name} cannot be listed: {error.strerror}; check its permissions") from None
    skipped.folders += [f"{Path(name, folder)}: {reason}" for folder, reason in tree.unreadable]
    if not below:
        what = "; ".join([*tree.ignored.lines(_LISTED), *skipped.folders[:_LISTED]])
        inside = f"; it holds {what}" if what else ""
        raise DataError(f"folder {name} holds no images ({', '.join(sorted(EXTENSIONS))}){inside}; check the path")
    skipped.files.add_all(tree.ignored, name)
    return below


def _from_pattern(pattern: str, skipped: Skipped) -> list[ImageFile]:
    paths = sorted(Path(path) for path in glob.iglob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    tree = ImageTree(Path())
    images = [ImageFile(str(path)) for path in paths if not path.is_dir() and tree.is_image(str(path))]
    if not images:
        raise DataError(f"pattern {pattern} matches no image ({', '.join(sorted(EXTENSIONS))}); check it")
    skipped.files.add_all(tree.ignored)
    return images


def _from_stdin(stdin: BinaryIO, skipped: Skipped) -> Iterator[ImageFile]:
    content = stdin.read(LONGEST_LIST + 1)
    if not content.strip():
        raise DataError("stdin (-) is empty; pipe an image into it, or names of files, one a line")
    head = content[:HEAD_BYTES]
    lines = content.splitlines() if b"\0" not in content else []
    kind = kind_of(head) or unread_kind("", head)
    # A name may begin as a file of some format does (GIF89a.png); of these only a PPM can be text.
    named = bool(lines) and os.path.exists(lines[0].strip())  # noqa: PTH110
    if kind and not named and (kind == "PPM" or not _is_text(content)):
        content += stdin.read(LARGEST_IMAGE + 1 - len(content))
        if len(content) > LARGEST_IMAGE:
            raise DataError(f"stdin (-) holds an image of more than {LARGEST_IMAGE} bytes; give it as a file")
        yield ImageFile("stdin", content)
        return
    if not named and not _is_text(content):
        raise DataError("stdin (-) holds neither an image nor names of files, one a line")
    if len(content) > LONGEST_LIST:
        raise DataError(f"stdin (-) holds more than {LONGEST_LIST} bytes of names; give it in parts, or give a folder")
    for line in filter(None, map(bytes.strip, lines)):
        yield from find_images([os.fsdecode(line)], io.BytesIO(), skipped)


def _is_text(content: bytes) -> bool:
    """Say whether bytes are UTF-8, but for a character that is cut off at their end, and hold no NUL."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:
        return False
    return b"\0" not in content
