"""A white sheet with captioned tiles and a legend of colours: the layout of every picture that we draw."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]  # (H, W, 3)
Colour = tuple[int, int, int]

INK, PALE, RULE = (32, 33, 36), (95, 99, 104), (208, 211, 215)
MARGIN, GAP, CAPTION, LEGEND_ROW = 16, 10, 25, 25


def compose(
    tiles: Sequence[tuple[str, Pixels]], columns: int, legend: Sequence[tuple[str, Colour | None]], title: str
) -> Image.Image:
    """Tiles of one size with their captions, `columns` to a row, a title above and a legend below.

    Args:
        tiles: (caption, RGB (H, W, 3) uint8), at least one.
        columns: tiles per row.
        legend: (name, colour); the colour None is drawn as hatching.
        title: one line, cut where it is too long; none if empty.
    """
    size = (tiles[0][1].shape[1], tiles[0][1].shape[0])
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    width = max(2 * MARGIN + columns * size[0] + (columns - 1) * GAP, 520)
    lines = _flow([name for name, _ in legend], width - 2 * MARGIN)
    top = MARGIN + (30 if title else 0)
    legend_top = top + rows * (CAPTION + size[1] + GAP) + 6
    height = legend_top + len(lines) * LEGEND_ROW + MARGIN - 6
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN, MARGIN - 3), _fit(title, font(18, bold=True), width - 2 * MARGIN), INK, font(18, bold=True))
    for number, (caption, pixels) in enumerate(tiles):
        left = MARGIN + (number % columns) * (size[0] + GAP)
        upper = top + (number // columns) * (CAPTION + size[1] + GAP)
        draw.text((left, upper), _fit(caption, font(15), max(size[0], 60)), PALE, font(15))
        sheet.paste(Image.fromarray(pixels), (left, upper + CAPTION))
        draw.rectangle((left, upper + CAPTION, left + size[0] - 1, upper + CAPTION + size[1] - 1), outline=RULE)
    for row, line in enumerate(lines):
        for number, offset in line:
            name, colour = legend[number]
            left, upper = MARGIN + offset, legend_top + row * LEGEND_ROW
            _chip(draw, left, upper + 3, colour)
            draw.text((left + 21, upper), _entry(name), INK, font(15))
    return sheet


def _chip(draw: ImageDraw.ImageDraw, left: int, upper: int, colour: Colour | None) -> None:
    """A square of the class's colour, or hatched."""
    draw.rectangle((left, upper, left + 13, upper + 13), fill=colour or (150, 150, 150), outline=RULE)
    if colour is None:
        for start in (0, 5):
            draw.line((left + 1, upper + 8 + start, left + 8 + start, upper + 1), fill=(245, 245, 245), width=2)


def _flow(names: Sequence[str], width: int) -> list[list[tuple[int, int]]]:
    """Break legend entries into lines of at most `width` pixels: (entry, offset from the left) per line."""
    lines: list[list[tuple[int, int]]] = []
    offset = width
    for number, name in enumerate(names):
        needed = 21 + int(font(15).getlength(_entry(name))) + 18
        if not lines or offset + needed > width:
            lines.append([])
            offset = 0
        lines[-1].append((number, offset))
        offset += needed
    return lines


def _entry(name: str) -> str:
    return _fit(name, font(15), 220)


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text on one line, cut with an ellipsis where it is too long."""
    text = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)[:400]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as shipped with matplotlib: the same letters on every machine, beyond Latin ones."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
