"""The names of foreign shards: which split each is of, which numbers are missing, and what lies beside them unread."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from adaptive.data.images.ignored import Ignored
from adaptive.data.images.image_kinds import left_behind
from adaptive.data.packing.folders.questions import listed
from adaptive.data.packing.folders.split_names import split_of, splits_in
from adaptive.data.packing.foreign.class_names import CLASSES_NAME
from adaptive.errors import DataError

NOT_A_SHARD = "no shard"
_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")
_PACKED = re.compile(r".*(\.tar\.[a-z0-9]+|\.t[gbx]z2?|\.tzst)", re.IGNORECASE)
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
_NUMBERED = re.compile(r"(?P<prefix>.*?)(?P<number>[0-9]+)(?P<of>[-_]of[-_](?P<total>[0-9]+))?")
_MOST_MISSING = 10  # for each shard that is there
_OTHER_CLASS_FILES = {
    "labels.txt",
    "class_names.txt",
    "classnames.txt",
    "classes.csv",
    "classes.json",
    "categories.txt",
}


def find_shards(folder: Path, left_out: Ignored) -> tuple[list[Path], list[str]]:
    """Return the tars of a folder, sorted, and notes about what lies beside them.

    Raises:
        DataError: there is none, or one that is compressed, unfinished or no regular file.
        OSError: the folder cannot be listed.
    """
    paths, notes = [], []
    folders = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            folders.append(path)
        elif reason := left_behind(path.name):
            _refuse_unfinished(path)
            left_out.add(reason, path.name)
        elif path.suffix == ".tar":
            if not path.is_file():
                raise DataError(f"{path} is no regular file or a link that leads nowhere; remove it")
            paths.append(path)
        elif path.suffix.lower() == ".tar":
            raise DataError(f"{path}: rename it; a shard's name ends in .tar, in lower case")
        elif _PACKED.fullmatch(path.name):
            _refuse_packed(path)
        elif path.name != CLASSES_NAME:
            left_out.add(NOT_A_SHARD, path.name)
            if path.name.lower() in {*_OTHER_CLASS_FILES, CLASSES_NAME} and not (folder / CLASSES_NAME).exists():
                notes.append(f"{path.name} is not read: class names are the lines of {CLASSES_NAME}")
    deeper = [found for path in folders if (found := next(path.glob("*.tar"), None))]
    if not paths:
        inside = f"; they lie in {listed([str(path.parent) for path in deeper])}" if deeper else ""
        raise DataError(f"{folder} holds no .tar files{inside}; give the folder of WebDataset shards")
    if deeper:
        notes.append(f"tars in folders inside are not indexed: {listed([f'{p.parent.name}/{p.name}' for p in deeper])}")
    return paths, notes


def _refuse_unfinished(path: Path) -> None:
    if ".tar" in path.suffixes and not path.name.startswith("."):
        raise DataError(f"{path} looks like an unfinished or old shard; finish it, or move it away")


def _refuse_packed(path: Path) -> None:
    if path.suffix.lower() in _COMPRESSED:
        raise DataError(f"{path} is compressed, and samples are read from anywhere; unpack it to .tar, or move it away")
    raise DataError(f"{path} looks like a shard, which ends in .tar; rename it, or move it away")


def split_of_shard(path: Path) -> str:
    """Return the split that a shard's name says (DataError: none or two, or characters that an index does not take)."""
    if not _NAME.fullmatch(path.name):
        raise DataError(f"{path}: rename it; a shard's name has letters, digits, - and _ before .tar")
    splits = splits_in(path.stem)
    if len(splits) > 1:
        first = next(split for word in re.split(r"[-_]", path.stem) if (split := split_of(word)))
        raise DataError(
            f"{path}: words of its name say {' and '.join(sorted(splits))}; rename it, for example to "
            f"{first}-{path.name}, without the other word"
        )
    if not splits:
        raise DataError(
            f"{path}: no word of its name says which split it is; rename it, for example to train-{path.name}"
        )
    return splits.pop()


def numbering_notes(names: Iterable[str]) -> list[str]:
    """Return sentences about numbers that are missing among the shards, or occur twice."""
    series: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    totals: dict[str, int] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name.removesuffix(".tar")):
            series[found["prefix"]][int(found["number"])].append(name)
            if found["total"]:
                totals[found["prefix"]] = int(found["total"])
    notes = []
    for prefix, numbered in sorted(series.items()):
        notes += [f"{' and '.join(found)} have the same number" for found in numbered.values() if len(found) > 1]
        expected = _expected(set(numbered), totals.get(prefix))
        missing = [f"{prefix}{number}" for number in expected if number not in numbered]
        if missing and len(missing) <= _MOST_MISSING * len(numbered):  # others are dates or the like
            notes.append(f"by the numbers of its shards {prefix} lacks {len(missing)}: {listed(missing)}")
    return notes


def _expected(numbers: set[int], total: int | None) -> range:
    """Return the numbers that a series of shards should have, from 0 or 1."""
    start = 1 if 0 not in numbers and (1 in numbers or total in numbers) else 0
    if total is not None:
        return range(start, start + total)
    return range(start, max(numbers) + 1) if len(numbers) > 1 else range(0)
