"""Image files: those that a command line names (files, folders, patterns, stdin), and those below a folder."""

from __future__ import annotations

import glob
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from adaptive.data.images.decode import decode_image
from adaptive.data.images.ignored import Ignored
from adaptive.data.images.image_kinds import EXTENSIONS
from adaptive.data.images.image_tree import ImageTree
from adaptive.errors import DataError

STDIN = "-"
_LISTED = 5  # kinds of other files that a message lists
MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"P4", b"P5", b"P6")


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
            found += _from_stdin(stdin.read(), skipped)
        elif Path(name).is_dir():
            found += _from_folder(name, skipped)
        elif Path(name).exists():
            found.append(ImageFile(name))
        elif glob.has_magic(name):
            found += _from_pattern(name, skipped)
        else:
            raise DataError(f"image {name} does not exist; give files, folders, patterns in quotes, or - for stdin")
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


def _from_stdin(content: bytes, skipped: Skipped) -> Iterator[ImageFile]:
    if not content.strip():
        raise DataError("stdin (-) is empty; pipe an image into it, or names of files, one a line")
    if content.startswith(MAGIC_BYTES):
        yield ImageFile("stdin", content)
        return
    try:
        lines = io.StringIO(content.decode("utf-8")).read().splitlines()
    except UnicodeDecodeError:
        raise DataError("stdin (-) holds neither an image nor names of files, one a line") from None
    for line in filter(None, map(str.strip, lines)):
        yield from find_images([line], io.BytesIO(), skipped)
