"""Colours, markers, and matplotlib's settings: one set for PNG files, another for drawings that a page shows too."""

from __future__ import annotations

from typing import Any

from adaptive.foreign_text import visible

# Okabe and Ito, Color Universal Design (2008); yellow is left out, it is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = (0, (4, 1.5))  # of budgeted curves and comparisons
DOTS_PER_INCH = 200
MARKERS = ("o", "s", "h", "D", "p", "8", "H")  # roomy enough for an exit's number
STYLE: dict[str, Any] = {
    "font.size": 11,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a class may be called $x
}

# Colours of a page's drawings, which its themes replace.
INK = "#1f2328"
MUTED = "#59636e"
GRID = "#dddde0"
PAPER = "#fffffe"  # unlike pure white, which stays white in both themes
FONT_SIZE = 12.0  # points; a page may shrink a chart to 96 % on a narrow screen, and text stays above 11 pixels

# The CSS variables that replace colours in a page; its template defines them for both themes.
PAGE_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour.lower(): f"--series-{i}" for i, colour in enumerate(COLOURS)
}
PAGE_STYLE: dict[str, Any] = STYLE | {
    "font.size": FONT_SIZE,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": FONT_SIZE,
    "legend.fontsize": FONT_SIZE,
    "xtick.labelsize": FONT_SIZE,
    "ytick.labelsize": FONT_SIZE,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],  # each text in an SVG names the whole list
}


def drawn(name: str) -> str:
    """Return a name as matplotlib can draw it: one line, and not hidden from a legend for its underscore in front."""
    name = visible(name)
    return f" {name}" if name.startswith("_") else name
