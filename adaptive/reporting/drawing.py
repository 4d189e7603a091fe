"""Drawings: a matplotlib figure as PNG, and as SVG whose colours follow the light or dark theme of a page."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from adaptive.reporting.style import DOTS_PER_INCH, PAGE_STYLE, PAGE_VARIABLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Drawing:
    """A finished figure, for a file and for a page.

    Attributes:
        name: stem of its file, and prefix of the ids inside its SVG; letters, digits, ``_`` and ``-``.
        caption: shown below it.
        alt: its content in words, for those who cannot see it.
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
    """Call ``paint`` with an empty figure of this size (inches), and render it as PNG and as SVG."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", PAGE_STYLE, {"svg.hashsalt": name}]), warnings.catch_warnings():
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
    """Adapt matplotlib's SVG to a page: unique ids, no style sheet, CSS variables for colours."""
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            # The style sheet would apply to the whole page, the metadata holds URLs of other sites.
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
    for colour, variable in PAGE_VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return style
