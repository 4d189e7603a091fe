"""Files that are left out: counted by reason, extension and folder, each with an example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from adaptive.data.images.image_kinds import extension_of

_LONGEST_EXTENSION = 12  # characters; what follows the last dot of a sentence is none


class IgnoredFiles(NamedTuple):
    """Files of one folder that are left out for one reason, and the path of one of them."""

    reason: str
    extension: str
    folder: str
    number: int
    example: str


@dataclass
class Ignored:
    """The files that are left out, by reason, extension, and the outermost folder below the source ("." for itself)."""

    _kinds: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)
    _examples: dict[tuple[str, str, str], str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of files."""
        return sum(count for (count,) in self._kinds.values())

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count a file by its path below the source, with slashes."""
        kind = (reason, shown_extension(name), name.partition("/")[0] if "/" in name else ".")
        if kind in self._kinds:
            self._kinds[kind][0] += count
        else:
            self._kinds[kind], self._examples[kind] = [count], name

    def add_all(self, other: Ignored, root: str = "") -> None:
        """Count what another account holds, of files below ``root``."""
        for files in other.by_folder():
            name = f"{root.rstrip('/')}/{files.example}" if root else files.example
            self.add(files.reason, name, files.number)

    def count(self, reason: str) -> int:
        """Return how many files are left out for a reason."""
        return sum(count for (other, _, _), (count,) in self._kinds.items() if other == reason)

    def by_folder(self) -> Iterator[IgnoredFiles]:
        """Yield all counts, sorted by folder."""
        for kind in sorted(self._kinds, key=lambda kind: (kind[2], kind[0], kind[1])):
            yield IgnoredFiles(*kind, self._kinds[kind][0], self._examples[kind])

    def by_kind(self) -> list[IgnoredFiles]:
        """Return the counts by reason and extension, the largest first; of several folders there is the number."""
        merged: dict[tuple[str, str], list[IgnoredFiles]] = {}
        for files in self.by_folder():
            merged.setdefault((files.reason, files.extension), []).append(files)
        rows = [
            IgnoredFiles(
                *kind,
                found[0].folder if len(found) == 1 else f"{len(found)} folders",
                sum(files.number for files in found),
                found[0].example,
            )
            for kind, found in merged.items()
        ]
        return sorted(rows, key=lambda files: (-files.number, files.reason, files.extension))

    def lines(self, most: int) -> list[str]:
        """Return a line per reason and extension with an example, and one that counts what is beyond ``most`` lines."""
        rows = self.by_kind()
        lines = [
            f"{files.number:,} {files.extension}: {files.reason}, for example {files.example}" for files in rows[:most]
        ]
        if rows[most:]:
            lines.append(f"{sum(files.number for files in rows[most:]):,} of {len(rows) - most} other kinds")
        return lines


def shown_extension(name: str) -> str:
    """Return a file's extension in lower case; `(none)` where it has none or what follows the last dot is text."""
    extension = extension_of(name)
    return extension if 1 < len(extension) <= _LONGEST_EXTENSION and " " not in extension else "(none)"
