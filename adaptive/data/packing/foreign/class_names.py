"""classes.txt beside foreign shards, and whether labels and classes fit each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from adaptive.data.packing.folders.questions import composed, listed, loosely
from adaptive.errors import DataError

CLASSES_NAME = "classes.txt"
_MOST_UNNAMED = 1_000_000
_REMEDY = "or say with --classes-as-named that it is meant so"


def read_class_names(folder: Path, as_named: bool) -> list[str] | None:
    """Return the classes that classes.txt names, one a line, or None where there is no such file.

    Raises:
        DataError: it is not UTF-8, has an empty line between others, or names a class twice.
        OSError: it cannot be read.
    """
    path = folder / CLASSES_NAME
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors on Windows put a byte-order mark in front
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8; write one class name a line") from None
    names = [line.strip() for line in text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")]
    if not all(names):
        raise DataError(f"{path}, line {names.index('') + 1} is empty; write one class name a line")
    for same, kind in ((composed, "twice"), (loosely, "twice, but for case, blanks or accents")):
        if as_named and same is loosely:
            continue
        seen: dict[str, str] = {}
        for name in names:
            if same(name) in seen:
                remedy = f", {_REMEDY}" if same is loosely else ""
                raise DataError(f"{path} names {seen[same(name)]} and {name}, one class {kind}; rename one{remedy}")
            seen[same(name)] = name
    return names


def classes_of(
    folder: Path, labels: Mapping[str, Counter[int]], named: list[str] | None, as_named: bool
) -> tuple[list[str], list[str]]:
    """Return the classes of foreign shards, and notes.

    Args:
        folder: of the shards.
        labels: how many samples of each label every split has.
        named: the classes by classes.txt; without it they are the numbers from 0 to the highest label.
        as_named: classes without a training image are meant so.

    Raises:
        DataError: a label is not that of a class, or a class has no training image.
    """
    present = {label for counts in labels.values() for label in counts}
    highest, lowest = max(present, default=-1), min(present, default=0)
    from_one = f" The labels run from 1 to {highest}: number them from 0." if lowest == 1 else ""
    if named is None and highest >= _MOST_UNNAMED:
        raise DataError(f"{folder}: label {highest} is no class number; name the classes in {CLASSES_NAME}")
    if named is not None and highest >= len(named):
        raise DataError(
            f"{folder / CLASSES_NAME} names {len(named)} classes, but label {highest} occurs; name all classes, one a "
            f"line, label 0 first.{from_one}"
        )
    classes = named if named is not None else [str(number) for number in range(highest + 1)]
    if not as_named and (fault := class_fault(labels, classes, named is None)):
        raise DataError(f"{folder}: {fault}.{from_one} Mend the labels or {CLASSES_NAME}, {_REMEDY}")
    return classes, empty_notes(labels, classes)


def class_fault(labels: Mapping[str, Counter[int]], classes: list[str], unnamed: bool = False) -> str:
    """Return what keeps a network from learning every class, nothing where each has a training image."""
    present = {label for counts in labels.values() for label in counts}
    learnt = labels["train"].keys() if "train" in labels else present if unnamed else set(range(len(classes)))
    absent = [label for label in range(len(classes)) if label not in learnt]
    if not absent:
        return ""
    names = listed([name if (name := classes[label]) == str(label) else f"{name} (label {label})" for label in absent])
    count = f"{len(absent)} of {len(classes)}"
    if lacking := sorted(split for split, counts in labels.items() if counts.keys() & set(absent)):
        return f"split {lacking[0]} has classes that train lacks, {count} have no training image: {names}"
    image = "training image" if "train" in labels else "image"
    return f"{count} classes have no {image}: {names}"


def empty_notes(labels: Mapping[str, Counter[int]], classes: list[str]) -> list[str]:
    """Return a sentence for every split but train that has no image of some class."""
    notes = []
    for split, counts in sorted(labels.items()):
        absent = [name for label, name in enumerate(classes) if label not in counts]
        if absent and split != "train":
            notes.append(f"split {split} has no image of {len(absent)} of {len(classes)} classes: {listed(absent)}")
    return notes
