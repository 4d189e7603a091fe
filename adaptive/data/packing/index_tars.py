"""An index for existing WebDataset tars, written beside them: nothing is copied or changed."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adaptive.data.images.ignored import Ignored
from adaptive.data.packing.account import Account, AccountRow
from adaptive.data.packing.foreign.class_names import classes_of, read_class_names
from adaptive.data.packing.foreign.shard_names import find_shards, numbering_notes, split_of_shard
from adaptive.data.packing.foreign.tar_check import TarContents, examine, read_label
from adaptive.data.packing.pack import PackReport
from adaptive.data.packing.progress_bar import PackProgress
from adaptive.data.shards.index import INDEX_NAME, DatasetIndex, ShardInfo, SplitInfo, write_index
from adaptive.data.shards.reader import IMAGE_EXTENSIONS
from adaptive.errors import DataError, MachineError
from adaptive.files import file_sha256
from adaptive.foreign_text import shell_words

_LISTED = 3
_OTHER_PART = "member that is neither image nor label"


def index_tars(folder: Path, progress: bool = True, classes_as_named: bool = False) -> DatasetIndex:
    """Write index.json beside tars of samples and return it, as `index_with_report` does."""
    return index_with_report(folder, progress, classes_as_named).index


def index_with_report(folder: Path, progress: bool = True, classes_as_named: bool = False) -> PackReport:
    """Write index.json beside tars of samples with an image (jpg, jpeg, png) and a class number (cls).

    The split is what a word of a tar's name says (``imagenet1k-train-0007.tar``); the classes are the lines of
    classes.txt, or else the numbers from 0 to the highest label. Images are not decoded.

    Args:
        folder: of the tars.
        progress: show progress on stderr.
        classes_as_named: classes without a training image are meant so.

    Raises:
        DataError: there is an index already, no tar, a name without a split, a tar that was cut off, a sample that
            is not one image and one label, or labels and classes that do not fit each other.
        MachineError: a file cannot be read, or the index not be written.
    """
    there = DataError(
        f"{folder} has an {INDEX_NAME} already; check it with: adaptive pack --verify {shell_words(folder)}"
    )
    if (folder / INDEX_NAME).exists():
        raise there
    try:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; give the folder of WebDataset shards")
        found = _Shards()
        paths, found.notes = find_shards(folder, found.left_out)
        named = read_class_names(folder, classes_as_named)
        splits = {path: split_of_shard(path) for path in paths}
        with PackProgress(len(paths), 0, progress, "indexing shards", "indexed") as shown:
            for path in paths:
                found.add(splits[path], path)
                shown.advance(1)
        classes, notes = classes_of(folder, found.labels, named, classes_as_named)
        infos = {
            name: SplitInfo(shards=s, count=sum(one.count for one in s)) for name, s in sorted(found.infos.items())
        }
        for name, info in infos.items():
            if not info.count:
                raise DataError(f"{folder}: the shards of split {name} hold no sample; fill or remove them")
        index = write_index(folder, classes, infos, replace=False)
    except FileExistsError:  # another was quicker
        raise there from None
    except OSError as error:
        raise MachineError(
            f"{error.filename or folder}: {error.strerror}; check the path and its permissions"
        ) from None
    notes = [*found.notes, *numbering_notes(path.name for path in paths), *notes, *found.repeated()]
    if "train" not in infos:
        notes.append("there is no split train: the dataset can be evaluated, not trained on")
    notes.append(f"images were not decoded; check all of them with: adaptive pack --verify {folder}")
    return PackReport(index, found.account(), [], [], notes)


class _Shards:
    """What is known of the shards so far.

    Attributes:
        infos: the shards' entries in the index, by split.
        labels: how many samples of each label a split has.
        left_out: files and members that are not read.
        notes: sentences for the summary.
    """

    def __init__(self) -> None:
        self.infos: dict[str, list[ShardInfo]] = defaultdict(list)
        self.labels: dict[str, Counter[int]] = {}
        self.left_out = Ignored()
        self.notes: list[str] = []
        self._images: Counter[tuple[str, str]] = Counter()
        self._keys: list[tuple[str, set[int]]] = []

    def add(self, split: str, path: Path) -> None:
        """Examine a shard (raises DataError with its first fault, OSError)."""
        contents = examine(path)
        refuse(path, contents.faults)
        self.labels.setdefault(split, Counter()).update(_labels(path, contents))
        shard = ShardInfo(
            name=path.name, count=len(contents.samples), bytes=path.stat().st_size, sha256=file_sha256(path)
        )
        for split_shards in self.infos.values():
            if twin := next((other for other in split_shards if other.sha256 == shard.sha256), None):
                self.notes.append(f"{shard.name} is a copy of {twin.name}, byte for byte")
        self.infos[split].append(shard)
        for reason, name in contents.left_out:
            self.left_out.add(reason, f"{path.name}/{name}")
        for key, parts in contents.samples:
            for extension in parts:
                if extension in IMAGE_EXTENSIONS:
                    self._images[split, f".{extension}"] += 1
                elif extension != "cls":
                    self.left_out.add(_OTHER_PART, f"{path.name}/{key}.{extension}")
        self._keys.append((path.name, {hash(key) for key, _ in contents.samples}))

    def repeated(self) -> list[str]:
        """Return a sentence about keys that several shards hold: another numbering in each of them, or copies."""
        lengths = [len(keys) for _, keys in self._keys]
        values = np.fromiter((key for _, keys in self._keys for key in keys), dtype=np.int64, count=sum(lengths))
        order = np.argsort(values, kind="stable")
        places = np.flatnonzero(values[order][1:] == values[order][:-1])
        if not len(places):
            return []
        owners = np.repeat(np.arange(len(lengths)), lengths)[order]
        one, other = (self._keys[owners[places[0] + step]][0] for step in (0, 1))
        count = f"{len(places):,} keys are in several shards, such as {one} and {other}"
        return [f"{count}: unless each shard numbers its samples anew, they are there twice"]

    def account(self) -> Account:
        """Return the account of images and of what is not read."""
        rows = [AccountRow(split, extension, n, n, 0, 0, 0) for (split, extension), n in sorted(self._images.items())]
        ignored: Counter[str] = Counter()
        for files in self.left_out.by_folder():
            ignored[files.extension] += files.number
        rows += [AccountRow(".", extension, n, 0, 0, 0, n) for extension, n in sorted(ignored.items())]
        return Account(rows, self.left_out)


def refuse(path: Path, faults: Sequence[tuple[str, str]]) -> None:
    """Raise the first fault of a shard, with the number of further ones (DataError)."""
    if faults:
        key, sentence = faults[0]
        more = f" (and {len(faults) - 1} more faults in this shard)" if len(faults) > 1 else ""
        raise DataError(f"{path}{f', sample {key}:' if key else ''} {sentence}{more}")


def _labels(path: Path, contents: TarContents) -> Mapping[int, int]:
    """Return how many samples of a shard have each label (DataError: one has none that is a class's number)."""
    labels: Counter[int] = Counter()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for key, parts in contents.samples:
            label = read_label(descriptor, *parts["cls"])
            if isinstance(label, str):
                raise DataError(f"{path}, sample {key}: {label}")
            if label < 0:
                raise DataError(f"{path}, sample {key}: label {label} is below 0; number classes from 0")
            labels[label] += 1
    finally:
        os.close(descriptor)
    return labels
