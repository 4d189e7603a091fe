"""The account of a packing: every file that was found is packed as it is, converted, bad or ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from adaptive.data.images.ignored import Ignored, shown_extension

MOST_LINES = 12  # of ignored kinds in a summary; as_tree has all

FileKind = tuple[str, str]  # folder ("." for no split's folder) and extension


def kind_of_file(name: str, folders: Collection[str]) -> FileKind:
    """Return the split's folder that a file lies in, "." for none, and its extension."""
    folder = name.partition("/")[0]
    return (folder if folder in folders else "."), shown_extension(name)


@dataclass(frozen=True)
class AccountRow:
    """Numbers of files of one folder and extension; ``found`` is the sum of the others."""

    folder: str
    extension: str
    found: int
    packed: int
    converted: int
    bad: int
    ignored: int


@dataclass(frozen=True)
class Account:
    """What became of the files of a source, by folder and extension; ``left_out`` says why files were ignored."""

    rows: list[AccountRow]
    left_out: Ignored

    @classmethod
    def of(
        cls,
        images: Iterable[str],
        converted: Counter[FileKind],
        bad: Iterable[str],
        left_out: Ignored,
        folders: Collection[str],
    ) -> Account:
        """Return the account of the names of all images, the numbers of converted ones, and the names of bad ones."""
        counted = Counter(kind_of_file(name, folders) for name in images)
        spoilt = Counter(kind_of_file(name, folders) for name in bad)
        ignored: Counter[FileKind] = Counter()
        for files in left_out.by_folder():
            ignored[files.folder if files.folder in folders else ".", files.extension] += files.number
        rows = [
            AccountRow(
                *kind,
                found=counted[kind] + ignored[kind],
                packed=counted[kind] - converted[kind] - spoilt[kind],
                converted=converted[kind],
                bad=spoilt[kind],
                ignored=ignored[kind],
            )
            for kind in sorted(counted.keys() | ignored.keys())
        ]
        return cls(rows, left_out)

    def total(self, column: str) -> int:
        """Return the sum of a column."""
        return sum(getattr(row, column) for row in self.rows)

    def as_tree(self) -> dict[str, object]:
        """Return it for JSON."""
        columns = ("found", "packed", "converted", "bad", "ignored")
        return {
            **{column: self.total(column) for column in columns},
            "files": [vars(row) for row in self.rows],
            "left_out": [files._asdict() for files in self.left_out.by_folder()],
        }

    def lines(self) -> list[str]:
        """Return lines for a summary: the sum, a table where there are several kinds of files, and what was ignored."""
        found, packed, converted, bad, ignored = (
            f"{self.total(column):,}" for column in ("found", "packed", "converted", "bad", "ignored")
        )
        kinds = f"{packed} packed as they are + {converted} converted + {bad} bad + {ignored} other files ignored"
        lines = [f"{found} files found = {kinds}"]
        if len(self.rows) > 1:
            lines += self._table()
        return lines + [f"ignored: {line}" for line in self.left_out.lines(MOST_LINES)]

    def _table(self) -> list[str]:
        cells: list[tuple[str, ...]] = [("folder", "files", "found", "as they are", "converted", "bad", "ignored")]
        rows = sorted(self.rows, key=lambda row: -row.found)
        for row in sorted(rows[:MOST_LINES], key=lambda row: (row.folder, row.extension)):
            numbers = (row.found, row.packed, row.converted, row.bad, row.ignored)
            cells.append((row.folder, row.extension, *(f"{number:,}" for number in numbers)))
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = []
        for texts in cells:
            left = "  ".join(text.ljust(width) for text, width in zip(texts[:2], widths[:2], strict=True))
            right = "  ".join(text.rjust(width) for text, width in zip(texts[2:], widths[2:], strict=True))
            lines.append(f"  {left}  {right}")
        if rows[MOST_LINES:]:
            lines.append(f"  and {len(rows) - MOST_LINES} other kinds of files (--json lists them)")
        return lines
