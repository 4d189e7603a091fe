"""One drawing, two files: a PNG, and an SVG for a page whose colours follow the page's light or dark theme."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design (2008); yellow is left out, it is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
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
}

INK = "#1f2328"
MUTED = "#59636e"
GRID = "#dddde0"
PAPER = "#fffffe"  # told apart from pure white, which stays white in both themes
DOTS_PER_INCH = 200
SMALLEST = 12.0  # points; the page may shrink a chart to 96 % on a narrow screen, and 11 pixels have to be left

# What stands for a colour in a page; its template defines the variables for both themes.
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour.lower(): f"--series-{i}" for i, colour in enumerate(COLOURS)
}
_STYLE: dict[str, Any] = STYLE | {
    "font.size": SMALLEST,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": SMALLEST,
    "legend.fontsize": SMALLEST,
    "xtick.labelsize": SMALLEST,
    "ytick.labelsize": SMALLEST,
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
    "text.parse_math": False,  # a class may be called $x
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],  # each text in an SVG names the whole list
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Drawing:
    """A finished figure.

    Attributes:
        name: stem of its file, and prefix of the ids inside its SVG; letters, digits, ``_`` and ``-``.
        caption: what it shows, for everybody.
        alt: what it says, for those who cannot see it.
        svg: an ``<svg>`` element for a page.
        png: content of a PNG file.
    """

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes


def draw(
    name: str, paint: Callable[[Figure], None], caption: str, alt: str, width: float = 5.0, height: float = 3.8
) -> Drawing:
    """Let ``paint`` fill an empty figure of this size (inches), and render it both ways."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE, {"svg.hashsalt": name}]), warnings.catch_warnings():
        # The PNG's font lacks some scripts; the page's browser has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH)
        FigureCanvasAgg(figure)
        # Browsers set the same text a little wider or higher than matplotlib measures it.
        figure.set_layout_engine("constrained", w_pad=6 / 72, h_pad=5 / 72)
        paint(figure)
        # Lay it out once: every file that is saved would do it again.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png")
        figure.savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
    return Drawing(name, caption, alt, _for_page(svg.getvalue(), name, alt), png.getvalue())


def _for_page(text: str, name: str, alt: str) -> str:
    """Make matplotlib's SVG fit into a page: ids of its own, no style sheet, variables for colours."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            # The style sheet would apply to the whole page, the metadata names addresses elsewhere.
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        attributes = element.attrib
        if "id" in attributes:
            attributes["id"] = f"{name}-{attributes['id']}"
        if _LINK in attributes:
            attributes["href"] = f"#{name}-{attributes.pop(_LINK)[1:]}"
        for key, value in attributes.items():
            if "url(#" in value:
                attributes[key] = value.replace("url(#", f"url(#{name}-")
        if "style" in attributes:
            attributes["style"] = _with_variables(attributes["style"])
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": "chart", "role": "img", "aria-label": alt}
    return ElementTree.tostring(root, encoding="unicode")


def _with_variables(style: str) -> str:
    for colour, variable in VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style
