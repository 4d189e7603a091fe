"""Tables for the terminal, and numbers with units."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adaptive.foreign_text import shown

MAX_WIDTH = 1000  # columns of a table that is not for a terminal
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "exit": ("exit", str),
    "module": ("after", str),
    "macs": ("MACs", lambda value: human(value)),
    "share": ("share", lambda value: f"{100 * value:.1f} %"),
    "ms": ("ms", lambda value: f"{value:.3g}"),
    "parameters": ("parameters", lambda value: human(value)),
    "block_parameters": ("of the block", lambda value: human(value)),
    "exit_parameters": ("of the exit", lambda value: human(value)),
    "top1": ("top-1 %", lambda value: f"{value:.2f}"),
    "top1_interval": ("interval", lambda value: percent_range(value)),
    "top1_loss": ("lost", lambda value: loss_with_range(*value)),
    "top5": ("top-5 %", lambda value: f"{value:.2f}"),
    "loss": ("loss", lambda value: f"{value:.3f}"),
}


def human(number: float, digits: int = 3) -> str:
    """Return a count with a unit and ``digits`` significant digits: 1_820_000_000 becomes "1.82 G"."""
    # Rounding may reach the next unit, so it comes first: 999 960 is 1.00 M, not 1000 k.
    number = float(f"{number:.{digits - 1}e}")
    for size, unit in UNITS:
        if abs(number) >= size:
            whole = len(str(int(abs(number) / size)))
            return f"{number / size:.{max(digits - whole, 0)}f} {unit}"
    return f"{number:.{digits}g}"


def percent_range(interval: Sequence[float]) -> str:
    """Return an interval of an accuracy in percent, "94.1 to 97.2"."""
    return f"{interval[0]:.1f} to {interval[1]:.1f}"


def loss_with_range(loss: float, interval: Sequence[float]) -> str:
    """Return points below the full network with their interval, "0.40 (-0.3 to 1.1)"."""
    return f"{loss + 0.0:.2f} ({interval[0] + 0.0:.1f} to {interval[1] + 0.0:.1f})"


def tick_label(text: str) -> str:
    """Shorten a number with a unit for an axis: "1.20 G" to "1.2 G", "0.50 ms" to "0.5"."""
    number, *unit = text.split()
    return " ".join([f"{float(number):g}", *(part for part in unit if part != "ms")])


def exit_table(rows: Iterable[Mapping[str, Any]], title: str | None = None) -> Table:
    """Return a table with one line per exit.

    Args:
        rows: per exit ``exit`` (number), ``module`` (the module it follows), ``macs`` (cumulative multiply-adds of one
            image), ``share`` (of the full cost, 0 to 1), ``ms`` (per image), ``parameters`` (cumulative),
            ``block_parameters``, ``exit_parameters``, ``top1`` and ``top5`` (percent), ``top1_interval`` (low, high),
            ``top1_loss`` (points, and their low and high), ``loss``.
            Columns that no row has are left out; single missing or None values stay blank.
        title: printed above.
    """
    rows = list(rows)
    names = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    table = Table(title=title, title_justify="left")
    for name in names:
        if name == "module":  # in a narrow terminal it folds, and does not vanish
            table.add_column(COLUMNS[name][0], min_width=6, overflow="fold")
        else:
            table.add_column(COLUMNS[name][0], justify="right", no_wrap=name not in ("top1_interval", "top1_loss"))
    for row in rows:
        table.add_row(*("" if row.get(name) is None else COLUMNS[name][1](row[name]) for name in names))
    return table


def print_table(table: Table) -> None:
    """Print ``table`` to standard output; into a pipe or a job's log as wide as it is, so that no column is cut.

    Its texts are shown as they are: brackets are no markup, and control characters are spelt out.
    """
    for column in table.columns:
        column.header = _plain(column.header)
        column._cells = [_plain(cell) for cell in column._cells]
    table.title = _plain(table.title, "table.title") if table.title else None
    console = _console()
    if not console.is_terminal:
        options = console.options.update(max_width=MAX_WIDTH)
        console = _console(width=max(console.width, console.measure(table, options=options).maximum))
    console.print(table)


def _console(width: int | None = None) -> Console:
    """A console to which brackets and colons are what they are: a class may be called [unk] or :smile:."""
    return Console(width=width, markup=False, emoji=False)


def _plain(cell: Any, style: str = "") -> Any:
    """Return a text that rich takes as it is; what is no string stays."""
    return Text("\n".join(map(shown, cell.split("\n"))), style=style) if isinstance(cell, str) else cell
