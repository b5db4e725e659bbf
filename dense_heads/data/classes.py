"""`classes.txt`: the names and colours of a task's classes."""

import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dense_heads.errors import UserError


@dataclass(frozen=True)
class Classes:
    """Names and colours in the order of the train ids."""

    names: tuple[str, ...]
    colours: npt.NDArray[np.uint8]  # (K, 3) RGB
    own_colours: bool  # the file gave the colours; they then also decode RGB masks


def read_classes(path: str | Path | None, num_classes: int | None) -> Classes:
    """Read `classes.txt`: one class a line, `name` and optionally a tab and `R,G,B`.

    Without a path the classes are called `class 0`, `class 1`, ... Where no line gives a colour, colours come from
    `default_palette`. With None as `num_classes` the file says how many there are.

    Raises:
        UserError: no such file, not `num_classes` lines, a colour that is none, colours on some lines only, or a name
            that stands there twice.
    """
    if path is None:
        assert num_classes is not None
        return Classes(tuple(f"class {i}" for i in range(num_classes)), default_palette(num_classes), False)
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no list of classes ({error}). Expected UTF-8 text, one class a line.") from error
    names, colours = [], []
    for number, line in enumerate(lines, start=1):
        name, _, colour = (part.strip() for part in line.partition("\t"))
        if not name:
            raise UserError(f"{path}, line {number}: empty; expected a class name, optionally a tab and R,G,B.")
        if name in names:
            raise UserError(f"{path}, line {number}: {name!r} stands there twice; expected each class once.")
        names.append(name)
        if colour:
            colours.append(_colour(colour, f"{path}, line {number}"))
    if num_classes is not None and len(names) != num_classes:
        raise UserError(
            f"{path}: {len(names)} classes, but num_classes is {num_classes}. Expected one line for each class (the "
            "ignored label has none). Fix task.num_classes or the file."
        )
    if colours and len(colours) != len(names):
        raise UserError(f"{path}: {len(colours)} of {len(names)} lines have a colour; expected all of them or none.")
    palette = np.array(colours, dtype=np.uint8) if colours else default_palette(len(names))
    return Classes(tuple(names), palette, bool(colours))


def default_palette(num_classes: int) -> npt.NDArray[np.uint8]:
    """(num_classes, 3) uint8 RGB, all different: hues a golden angle apart, in four shades that take turns."""
    shades = ((0.70, 0.95), (0.95, 0.60), (0.40, 0.80), (0.85, 0.35))  # saturation, value
    colours = [colorsys.hsv_to_rgb(i * 0.6180339887 % 1.0, *shades[i % len(shades)]) for i in range(num_classes)]
    return np.array([[round(255 * channel) for channel in colour] for colour in colours], dtype=np.uint8).reshape(-1, 3)


def _colour(text: str, where: str) -> list[int]:
    try:
        channels = [int(part) for part in text.split(",")]
    except ValueError:
        channels = []
    if len(channels) != 3 or not all(0 <= channel <= 255 for channel in channels):
        raise UserError(f"{where}: {text!r} is no colour; expected R,G,B with numbers from 0 to 255, such as 128,64,0.")
    return channels
