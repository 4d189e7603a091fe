"""CIFAR-10 and CIFAR-100 from their binary archives; the python version holds pickles, which can run code.

https://www.cs.toronto.edu/~kriz/cifar.html: records of one label byte (CIFAR-100: two, coarse then fine) and 3072 bytes
of pixels, 32 rows of 32 for red, then green, then blue.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from adaptive.data.packing.archives import read_files
from adaptive.data.packing.sources import Item, Source, check_filled
from adaptive.errors import DataError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_LIMIT = 256 << 20  # bytes of one file; the largest has 154 million
_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclass(frozen=True)
class _Layout:
    """The files of one of the two data sets, and the label bytes of a record, of which the last one is used."""

    title: str
    classes: str
    splits: dict[str, tuple[str, ...]]
    label_bytes: int

    @property
    def files(self) -> set[str]:
        return {self.classes, *(name for names in self.splits.values() for name in names)}


_LAYOUTS = (
    _Layout(
        "CIFAR-10",
        "batches.meta.txt",
        {"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
        1,
    ),
    _Layout("CIFAR-100", "fine_label_names.txt", {"train": ("train.bin",), "test": ("test.bin",)}, 2),
)


def open_archive(path: Path) -> Source:
    """Read ``cifar-10-binary.tar.gz`` or ``cifar-100-binary.tar.gz``; images become PNGs, which lose nothing.

    Raises:
        DataError: the archive is another one (the python version, say), cut off, or holds labels without a class.
        OSError: the file cannot be read.
    """
    wanted = set().union(*(layout.files for layout in _LAYOUTS))
    contents, names = read_files(path, wanted.__contains__, _LIMIT)
    layout = next((layout for layout in _LAYOUTS if layout.files & set(contents)), None)
    if layout is None:
        if any(part in name for name in names for part in ("cifar-10-batches-py", "cifar-100-python")):
            raise DataError(
                f"source {path} is CIFAR's python version, whose pickles are not opened because they can run code; "
                f"take the binary version, {path.name.replace('python', 'binary')}, from {_PAGE}"
            )
        raise DataError(f"source {path} holds neither CIFAR-10 nor CIFAR-100 in binary; unpack it and give the folder")
    if missing := sorted(layout.files - set(contents)):
        raise DataError(f"{path} lacks {', '.join(missing)} of {layout.title}; download it again from {_PAGE}")
    classes = contents[layout.classes].decode("utf-8", "replace").split()
    changed = path.stat().st_mtime_ns
    splits = {
        split: sorted(
            (item for name in files for item in _items(split, name, contents[name], layout, classes, changed)),
            key=lambda item: (item.label, item.name),
        )
        for split, files in layout.splits.items()
    }
    check_filled(path, classes, splits)
    return Source(None, classes, splits)


def _items(split: str, file: str, content: bytes, layout: _Layout, classes: list[str], changed: int) -> Iterator[Item]:
    width = layout.label_bytes + _PIXELS
    if len(content) % width:
        raise DataError(f"{file} of {layout.title} has {len(content)} bytes, no multiple of {width}; download it again")
    records = np.frombuffer(content, np.uint8).reshape(-1, width)
    stem = file.removesuffix(".bin")
    for number, record in enumerate(records):
        label = int(record[layout.label_bytes - 1])
        if label >= len(classes):
            raise DataError(
                f"{file} of {layout.title}: record {number} has label {label}, {layout.classes} names "
                f"{len(classes)} classes; download it again"
            )
        stream = io.BytesIO()
        pixels = record[layout.label_bytes :].reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(pixels)).save(stream, "png")
        data = stream.getvalue()
        yield Item(f"{split}/{classes[label]}/{stem}_{number:05d}.png", label, len(data), changed, data)
