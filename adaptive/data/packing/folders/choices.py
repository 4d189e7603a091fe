"""The answers that flags give where a folder can be read in more than one way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from adaptive.errors import DataError


@dataclass(frozen=True)
class FolderChoices:
    """How a folder of images is to be read.

    Attributes:
        no_splits: all folders are classes, also those that are called like splits, or a single one.
        classes_as_named: class names that differ only in case, and classes of folders in folders, are meant so.
        leave_out: paths below the source that are not read.
    """

    no_splits: bool = False
    classes_as_named: bool = False
    leave_out: frozenset[str] = frozenset()

    @classmethod
    def of(cls, root: Path, no_splits: bool, classes_as_named: bool, leave_out: tuple[str, ...]) -> FolderChoices:
        """Return the choices for a source (DataError: a path to leave out is not in it)."""
        names = set()
        for given in leave_out:
            name = os.path.relpath(given, root) if Path(given).is_absolute() else os.path.normpath(given)
            if name.split("/")[0] in ("..", ".") or not os.path.lexists(root / name):
                raise DataError(f"--leave-out {given}: there is no such file or folder in {root}; give its path there")
            names.add(name)
        return cls(no_splits, classes_as_named, frozenset(names))
