"""An index for existing WebDataset tars, written beside them: nothing is copied or changed."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from pathlib import Path

from adaptive.data.packing.progress_bar import PackProgress
from adaptive.data.shards.index import INDEX_NAME, DatasetIndex, ShardInfo, SplitInfo, write_index
from adaptive.data.shards.reader import LocalFiles, ShardReader, samples_of
from adaptive.errors import DataError, MachineError
from adaptive.files import file_sha256
from adaptive.foreign_text import shell_words

CLASSES_NAME = "classes.txt"
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")


def index_tars(folder: Path, progress: bool = True) -> DatasetIndex:
    """Write index.json beside tars of samples with an image (jpg, jpeg, png) and a class number (cls).

    The split is the first word of a tar's name that is train, val, validation or test (``imagenet1k-train-0007.tar``);
    the classes are the lines of classes.txt, or else the numbers from 0 to the highest label.

    Raises:
        DataError: there is an index already, no tar, a name without a split, or a sample without image or label.
        MachineError: a file cannot be read, or the index not be written.
    """
    if (folder / INDEX_NAME).exists():
        raise DataError(
            f"{folder} has an {INDEX_NAME} already; check it with: adaptive pack --verify {shell_words(folder)}"
        )
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder} holds no .tar files; give the folder of WebDataset shards")
    splits: dict[str, list[ShardInfo]] = defaultdict(list)
    highest = -1
    try:
        with PackProgress(len(paths), 0, progress, "indexing shards", "indexed") as shown:
            for path in paths:
                split = _split_of(path)
                shard, label = _examine(path)
                splits[split].append(shard)
                highest = max(highest, label)
                shown.advance(1)
        classes = _classes(folder, highest)
        infos = {name: SplitInfo(shards=s, count=sum(one.count for one in s)) for name, s in sorted(splits.items())}
        return write_index(folder, classes, infos)
    except OSError as error:
        raise MachineError(
            f"{error.filename or folder}: {error.strerror}; check the path and its permissions"
        ) from None


def _split_of(path: Path) -> str:
    if not _NAME.fullmatch(path.name):
        raise DataError(f"{path}: rename it; a shard's name has letters, digits, - and _ before .tar")
    for word in re.split(r"[-_]", path.stem.lower()):
        if word in _SPLITS:
            return _SPLITS[word]
    raise DataError(f"{path}: no word of its name says which split it is; rename it, for example to train-{path.name}")


def _examine(path: Path) -> tuple[ShardInfo, int]:
    """Return a shard's entry in the index, and its highest label."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        count = len(samples_of(str(path), descriptor))
    finally:
        os.close(descriptor)
    shard = ShardInfo(name=path.name, count=count, bytes=path.stat().st_size, sha256=file_sha256(path))
    reader = ShardReader(LocalFiles(path.parent), [shard], capacity=1)
    try:
        labels = [reader.read(0, position).label for position in range(count)]
    finally:
        reader.close()
    if labels and min(labels) < 0:
        raise DataError(f"{path}: label {min(labels)} is below 0; number classes from 0")
    return shard, max(labels, default=-1)


def _classes(folder: Path, highest: int) -> list[str]:
    path = folder / CLASSES_NAME
    if not path.is_file():
        if highest >= 1_000_000:
            raise DataError(f"{folder}: label {highest} is no class number; name the classes in {CLASSES_NAME}")
        return [str(number) for number in range(highest + 1)]
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; write one class name a line") from None
    if highest >= len(names):
        raise DataError(f"{path} names {len(names)} classes, but label {highest} occurs; name all classes, one a line")
    return names
