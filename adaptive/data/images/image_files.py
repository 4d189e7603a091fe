"""Image files: those that a command line names (files, folders, patterns, stdin), and those below a folder."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO

from PIL import Image

from adaptive.data.images.decode import decode_image
from adaptive.errors import DataError

# torchvision's list, and GIF, of which single frames are taken.
EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif"}

STDIN = "-"
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


def find_images(names: Iterable[str], stdin: BinaryIO) -> list[ImageFile]:
    """Return the images that a command line names, in that order; those of a folder or pattern sorted by path.

    Args:
        names: files, folders (searched to any depth for image files), patterns (``**`` reaches any depth), and ``-``
            for the standard input: one image, or names of files, one a line.
        stdin: read if ``-`` is among the names.

    Raises:
        DataError: a name leads to no file, a folder or pattern to no image.
    """
    found: list[ImageFile] = []
    for name in names:
        if name == STDIN:
            found += _from_stdin(stdin.read())
        elif Path(name).is_dir():
            below = [ImageFile(str(path)) for path in files_below(Path(name)) if is_image(path.name)]
            if not below:
                raise DataError(f"folder {name} holds no images ({', '.join(sorted(EXTENSIONS))}); check the path")
            found += below
        elif Path(name).exists():
            found.append(ImageFile(name))
        elif glob.has_magic(name):
            found += _from_pattern(name)
        else:
            raise DataError(f"image {name} does not exist; give files, folders, patterns in quotes, or - for stdin")
    return found


def _from_pattern(pattern: str) -> list[ImageFile]:
    paths = sorted(Path(path) for path in glob.iglob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    images = [ImageFile(str(path)) for path in paths if path.is_file() and is_image(path.name)]
    if not images:
        raise DataError(f"pattern {pattern} matches no image ({', '.join(sorted(EXTENSIONS))}); check it")
    return images


def _from_stdin(content: bytes) -> Iterator[ImageFile]:
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
        yield from find_images([line], io.BytesIO())


def is_image(name: str) -> bool:
    """Say whether a file's name is that of an image, to be packed or predicted."""
    return PurePath(name).suffix.lower() in EXTENSIONS and not name.startswith(".")


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files at any depth, those of a folder sorted by name, before those of its folders."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))
