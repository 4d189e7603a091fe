"""What has to be asked of the user, because a folder can be read in more than one way: refusals that name the flag."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from adaptive.data.packing.folders.split_names import split_of, splits_in, usual_names
from adaptive.errors import DataError

_LISTED = 5


def listed(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def composed(name: str) -> str:
    """Return a name with its accents composed: as text it is the same, and as bytes it may not be."""
    return unicodedata.normalize("NFC", name)


def loosely(name: str) -> str:
    """Return what two names have in common that differ only in case, accents' composition or blanks."""
    return " ".join(composed(composed(name).casefold()).split())


def check_split_names(root: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the folder of every split by the names of a source's folders, empty where all of them are classes.

    Raises:
        DataError: two folders are one split, train is missing, or folders are called like splits among class folders.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if split := split_of(name):
            folders[split].append(name)
    others = [name for name in names if not split_of(name)]
    if not folders:
        _check_alike(root, names)
        return {}
    if "train" not in folders:
        called = [name for found in folders.values() for name in found]
        if not others:
            raise DataError(
                f"{root} has {listed(called)} but no train folder; add it, rename one ({usual_names(['train'])}), or "
                "take them as classes with --no-splits"
            )
        raise DataError(
            f"{root} has {listed(called)}, which is called like a split, beside {len(others)} other folders "
            f"({listed(others)}) and no train folder: take all of them as classes with --no-splits, leave it out with "
            f"--leave-out {called[0]}, or move the classes into a folder train"
        )
    for split, found in folders.items():
        if len(found) > 1:
            raise DataError(
                f"{root} has both {' and '.join(found)}, which all mean split {split}; keep one of them, with "
                f"--leave-out {found[-1]}, or take all folders as classes with --no-splits"
            )
    return {split: found[0] for split, found in folders.items()}


def _check_alike(root: Path, names: Sequence[str]) -> None:
    splits = {name: splits_in(name) for name in names}
    if len(set().union(*splits.values())) > 1:
        raise DataError(
            f"the folders {listed([name for name in names if splits[name]])} of {root} look like splits; rename them "
            f"({usual_names()}), or take all folders as classes with --no-splits"
        )


def check_sibling(root: Path, splits: Iterable[str], name: str, inside: Sequence[str], classes: Iterable[str]) -> None:
    """Refuse a folder beside splits that holds class folders which would not be used.

    Args:
        root: the source.
        splits: names of its folders that are splits.
        name: of the other folder.
        inside: the folders in it that hold images, "" where images lie in itself.
        classes: names of the folders in train; without any, train may be a class as well.

    Raises:
        DataError: it has several such folders, or one that is a class of train; or it is one.
    """
    known = {loosely(known) for known in classes}
    below = [folder for folder in inside if folder]
    if not known or len(below) > 1 or any(loosely(folder) in known for folder in (name, *below)):
        where = listed([f"{name}/{folder}".rstrip("/") for folder in inside])
        raise DataError(
            f"{root} has {listed(sorted(splits))}, and beside them {name}, whose images no split would hold ({where}): "
            f"leave it out with --leave-out {name}, move it, or take all folders as classes with --no-splits"
        )


def check_class_names(folder: Path, names: Sequence[str]) -> None:
    """Refuse class names that are the same but for case, blanks or how accents are composed (raises DataError)."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[loosely(name)].append(name)
    if twice := [found for found in alike.values() if len(found) > 1]:
        raise DataError(
            f"{folder} has class folders whose names differ only in case, blanks or the composition of accents: "
            f"{listed([' and '.join(found) for found in twice])}; merge or rename them, or say with --classes-as-named "
            "that they are different classes"
        )


def match_classes(split: str, folder: Path, names: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Return the label of each class folder of a split; accents may be composed otherwise than in train's names.

    Raises:
        DataError: a folder is no class of train; where train has one that is alike, both are named.
    """
    labels = {name: label for label, name in enumerate(classes)}
    same = {composed(name): label for label, name in enumerate(classes)}
    alike = {loosely(name): name for name in classes}
    found, strange = {}, []
    for name in names:
        label = labels.get(name, same.get(composed(name)))
        if label is None:
            strange.append(f"{name} (train has {alike[loosely(name)]})" if loosely(name) in alike else name)
        else:
            found[name] = label
    if strange:
        remedy = (
            "rename them as train does, remove them"
            if any(" (train has" in name for name in strange)
            else ("remove them")
        )
        raise DataError(
            f"{folder} has {len(strange)} classes that train lacks: {listed(strange)}; {remedy}, add training images, "
            f"or leave folders out with --leave-out {folder.name}/NAME"
        )
    return found


def check_nesting(folder: Path, inside: dict[str, dict[str, int]]) -> list[str]:
    """Refuse class folders that hold nothing but folders of images, which then may be the classes.

    Args:
        folder: with the class folders.
        inside: per class how many images lie in each of its folders, under "" those that lie in none.

    Returns:
        Sentences about the classes of which a part lies in folders inside.

    Raises:
        DataError: no class has images of its own, and at least one has several folders, or there is one class alone.
    """
    filled = {name: counts for name, counts in inside.items() if counts}
    nested = {name: [f for f in counts if f] for name, counts in filled.items() if any(counts)}
    if nested and not any("" in counts for counts in filled.values()):
        name, below = max(nested.items(), key=lambda item: len(item[1]))
        if len(filled) == 1:
            what = "splits" if any(map(split_of, below)) else "class folders"
            raise DataError(
                f"all images of {folder} lie in {name}, in folders of their own ({listed(below)}), which look like "
                f"{what}: give {folder / name}, or take {name} as the one class with --classes-as-named"
            )
        if len(below) > 1:
            raise DataError(
                f"the class folders of {folder} hold no images but folders with images ({name}: {listed(below)}): if "
                "these are the classes, move them up; if not, say so with --classes-as-named"
            )
    names = [f"{name}/{inner}" for name, inners in nested.items() for inner in inners]
    if not names:
        return []
    images = sum(filled[name][inner] for name, inners in nested.items() for inner in inners)
    return [f"{images:,} images lie in folders inside of class folders and are of that class: {listed(names)}"]
