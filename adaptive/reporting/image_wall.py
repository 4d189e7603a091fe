"""The image wall: a picture of sample images sorted by the exit at which they leave, from easy to hard."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from adaptive.errors import MachineError
from adaptive.files import write_atomically
from adaptive.reporting.report_data import RunReport
from adaptive.reporting.tables import human

THUMBNAIL = 96  # pixels; larger images are scaled down to it
_NEAREST_SIZE = 16  # pixels; images up to it are enlarged without smoothing

# Geometry of the picture, in pixels.
_TILE, _GAP, _CAPTION, _ACROSS = 112, 14, 24, 12
_MARGIN, _SIDE, _TOP, _FOOT, _BAND_GAP = 56, 236, 196, 62, 44
_GROUND, _LIGHT, _DIM, _RULE, _WRONG = "#0f1318", "#f2f4f7", "#9aa5b1", "#2b333d", "#ff9d4d"


@dataclass(frozen=True)
class Tile:
    """One image on the wall: its id in the split, true class, answer, the answer's probability, and its exit.

    ``right`` compares the classes' numbers: two classes may share a name.
    """

    image: Image.Image
    id: int
    label: str
    answer: str
    confidence: float
    exit: int
    right: bool

    @property
    def description(self) -> str:
        """The image in a sentence."""
        verdict = "right" if self.right else f"wrong, it is {self.label}"
        return f"{self.answer}, {100 * self.confidence:.0f} % sure at exit {self.exit}: {verdict} (image {self.id})"


def choose(run: RunReport, per_exit: int) -> list[int]:
    """Choose images by their index in the run, exit after exit, at even steps from the surest to the least sure."""
    chosen: list[int] = []
    for number in range(1, len(run.macs) + 1):
        ranked = run.left_at(number)
        steps = np.linspace(0, len(ranked) - 1, min(per_exit, len(ranked))).round().astype(int)
        chosen += ranked[steps].tolist()
    return chosen


def tiles(run: RunReport, chosen: Sequence[int], images: Sequence[Image.Image]) -> list[Tile]:
    """Return the tiles of chosen images, given in the same order."""
    assert run.exits is not None
    assert run.leaving is not None
    given = run.given
    return [
        Tile(
            image,
            int(run.ids[i]),
            run.classes[run.labels[i]],
            run.classes[given[i]],
            float(run.leaving[i]),
            int(run.exits[i]),
            bool(given[i] == run.labels[i]),
        )
        for i, image in zip(chosen, images, strict=True)
    ]


def thumbnail(image: Image.Image) -> str:
    """Return a ``data:`` URL of the image, at most 96 pixels wide and high, in the smaller of PNG and JPEG."""
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    found = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85, "optimize": True})):
        if kind == "jpeg" and max(image.size) <= 64:
            continue  # its block artefacts would show
        buffer = io.BytesIO()
        image.save(buffer, format=kind, **options)
        found.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(found)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def square(image: Image.Image, size: int) -> Image.Image:
    """Crop an image to its central square, and scale it to this size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    centre = image.convert("RGB").crop((left, top, left + side, top + side))
    how = Image.Resampling.NEAREST if side <= _NEAREST_SIZE else Image.Resampling.LANCZOS
    return centre.resize((size, size), how)


def draw_wall(run: RunReport, shown: Sequence[Tile], path: str | Path) -> Path:
    """Draw the tiles into one PNG, a band per exit; returns the path, MachineError if it cannot be written."""
    bands = [[tile for tile in shown if tile.exit == i] for i in range(1, len(run.macs) + 1)]
    across = max(1, min(_ACROSS, max((len(band) for band in bands), default=1)))
    heights = [max(1, -(-len(band) // across)) * (_TILE + _CAPTION + _GAP) - _GAP for band in bands]
    width = 2 * _MARGIN + _SIDE + max(7, across) * (_TILE + _GAP) - _GAP
    height = _TOP + sum(heights) + (len(bands) - 1) * _BAND_GAP + _FOOT + 16
    picture = Image.new("RGB", (width, height), _GROUND)
    pen = ImageDraw.Draw(picture)
    _head(pen, run, width)
    top = _TOP
    for number, (band, tall) in enumerate(zip(bands, heights, strict=True), start=1):
        if number > 1:
            pen.line((_MARGIN, top - _BAND_GAP // 2, width - _MARGIN, top - _BAND_GAP // 2), fill=_RULE, width=2)
        _side(pen, run, number, top)
        if not band:
            pen.text((_MARGIN + _SIDE, top + tall // 2), "nobody leaves here", _DIM, _font(19), anchor="lm")
        for number_in_band, tile in enumerate(band):
            row, column = divmod(number_in_band, across)
            _tile(picture, pen, tile, _MARGIN + _SIDE + column * (_TILE + _GAP), top + row * (_TILE + _CAPTION + _GAP))
        top += tall + _BAND_GAP
    _foot(pen, width, height)
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    try:
        write_atomically(Path(path), content.getvalue())
    except OSError as error:
        raise MachineError(f"cannot write the picture {path}: {error.strerror or error}") from error
    return Path(path)


def _head(pen: ImageDraw.ImageDraw, run: RunReport, width: int) -> None:
    pen.text((_MARGIN, 46), "Easy to hard", _LIGHT, _font(46, bold=True))
    share = 100 * run.policy_macs / run.macs[-1]
    lines = (
        f"{run.images:,} {run.split} images of {run.dataset}, each where {run.name} lets it go:",
        f"{run.policy_top1:.1f} % right at {share:.0f} % of the full cost (the last exit alone: {run.top1[-1]:.1f} %)",
    )
    for i, line in enumerate(lines):
        pen.text((_MARGIN + 2, 106 + 27 * i), _fitted(line, width - 2 * _MARGIN, 19), _DIM, _font(19))


def _side(pen: ImageDraw.ImageDraw, run: RunReport, number: int, top: int) -> None:
    """Write an exit's share, accuracy and cost to the left of its images."""
    share, accuracy = run.shares[number - 1], run.accuracy_at(number)
    pen.text((_MARGIN, top - 6), f"exit {number}", _LIGHT, _font(30, bold=True))
    pen.text((_MARGIN, top + 38), f"{100 * share:.0f} % leave here", _LIGHT, _font(18))
    right = "" if accuracy is None else f"{accuracy:.0f} % of them right"
    pen.text((_MARGIN, top + 63), right, _DIM, _font(18))
    pen.text((_MARGIN, top + 88), f"{human(run.macs[number - 1])}MACs each", _DIM, _font(18))
    long = _SIDE - 40
    pen.rounded_rectangle((_MARGIN, top + 120, _MARGIN + long, top + 126), 3, fill=_RULE)
    if share > 0:
        pen.rounded_rectangle((_MARGIN, top + 120, _MARGIN + max(6, round(long * share)), top + 126), 3, fill="#56B4E9")


def _tile(picture: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, x: int, y: int) -> None:
    mask = Image.new("L", (2 * _TILE, 2 * _TILE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 2 * _TILE - 1, 2 * _TILE - 1), 16, fill=255)
    picture.paste(square(tile.image, _TILE), (x, y), mask.resize((_TILE, _TILE), Image.Resampling.LANCZOS))
    middle = x + _TILE // 2
    if tile.right:
        pen.text((middle, y + _TILE + 15), _fitted(tile.answer, _TILE, 16), _DIM, _font(16), anchor="mm")
        return
    pen.rounded_rectangle((x - 3, y - 3, x + _TILE + 2, y + _TILE + 2), 10, outline=_WRONG, width=2)
    right, size = x + _TILE - 2, 24
    pen.rounded_rectangle((right - size, y + 2, right, y + 2 + size), 6, fill=_WRONG)
    for ends in (((right - 17, y + 9), (right - 7, y + 19)), ((right - 7, y + 9), (right - 17, y + 19))):
        pen.line(ends, fill=_GROUND, width=3)
    pen.text((middle, y + _TILE + 15), _fitted(tile.answer, _TILE, 16), _WRONG, _font(16, bold=True), anchor="mm")


def _foot(pen: ImageDraw.ImageDraw, width: int, height: int) -> None:
    y = height - _FOOT + 22
    note = "In each exit: surest first, at even steps down to the least sure. Below each image: the network's answer."
    pen.text((_MARGIN, y), _fitted(note, width - 2 * _MARGIN - 150, 17), _DIM, _font(17), anchor="lm")
    x = width - _MARGIN - 110
    pen.rounded_rectangle((x, y - 11, x + 22, y + 11), 6, fill=_WRONG)
    for ends in (((x + 6, y - 5), (x + 16, y + 5)), ((x + 16, y - 5), (x + 6, y + 5))):
        pen.line(ends, fill=_GROUND, width=3)
    pen.text((x + 34, y), "wrong", _WRONG, _font(17, bold=True), anchor="lm")


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, size)


def _fitted(text: str, width: int, size: int) -> str:
    """Shorten a line to at most ``width`` pixels."""
    font = _font(size, bold=True)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
