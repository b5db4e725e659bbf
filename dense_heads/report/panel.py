"""Label maps in the data set's colours, and panels of image, label, prediction and errors."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dense_heads.errors import UserError
from dense_heads.report.sheet import Colour, Pixels, compose
from dense_heads.structures import IGNORE_INDEX

Value = TypeVar("Value", bound=np.generic)
Mask = NDArray[np.integer[Any]]  # (H, W) class ids, IGNORE_INDEX where nothing is known

WRONG = (222, 45, 38)
LEGEND_MAX = 30


def colour_map(mask: Mask, palette: Pixels) -> Pixels:
    """Class ids (H, W) -> RGB (H, W, 3) through a palette (K, 3); ignored pixels are black.

    Raises:
        UserError: a value that is neither a class of the palette nor the ignored one.
    """
    palette = np.asarray(palette, dtype=np.uint8).reshape(-1, 3)
    known = (mask >= 0) & (mask < len(palette))
    if not np.all(known | (mask == IGNORE_INDEX)):
        found = np.unique(mask[~known & (mask != IGNORE_INDEX)])[:8].tolist()
        raise UserError(
            f"A label map holds the values {found}; expected 0 to {len(palette) - 1}, or {IGNORE_INDEX} for ignored "
            "pixels. Give one colour per class (classes.txt), or map the values with task.data.labels."
        )
    colours: Pixels = palette[np.where(known, mask, 0)]
    colours[~known] = 0
    return colours


def overlay(image: Pixels, mask: Mask, palette: Pixels, alpha: float = 0.5, contours: bool = True) -> Pixels:
    """The image (H, W, 3) with its classes laid over it; ignored pixels show the image itself.

    Args:
        image: RGB, uint8.
        mask: class ids (H, W), the image's own size.
        palette: RGB of each class, (K, 3).
        alpha: share of the class's colour, 0 to 1.
        contours: whether borders between classes are drawn in the full colour.

    Raises:
        UserError: image and mask differ in size, or `mask` holds values outside the classes.
    """
    if image.shape[:2] != mask.shape:
        raise UserError(
            f"An image of {image.shape[:2]} pixels (height, width) and a label map of {mask.shape} cannot be laid over "
            "each other: expected equal sizes. Resize the label map to the image first."
        )
    colours = colour_map(mask, palette).astype(np.float32)
    mixed = image + alpha * (colours - image)
    if contours:
        border = np.zeros(mask.shape, dtype=bool)
        across, down = mask[:, 1:] != mask[:, :-1], mask[1:] != mask[:-1]
        border[:, 1:] |= across  # both sides of a border, so that each class keeps its own colour there
        border[:, :-1] |= across
        border[1:] |= down
        border[:-1] |= down
        mixed[border] = colours[border]
    ignored = mask == IGNORE_INDEX
    mixed[ignored] = image[ignored]
    return np.rint(mixed).astype(np.uint8)


def segmentation_panel(
    image: Pixels | None,
    label: Mask | None,
    prediction: Mask,
    palette: Pixels,
    class_names: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Image | label | prediction | errors side by side, with captions and a legend of the classes that occur.

    Args:
        image: RGB (H, W, 3) uint8; None where there is none to show (features from a cache, file gone).
        label: class ids (H, W), or None where nothing is known: then no errors are shown either.
        prediction: class ids (H, W).
        palette: RGB of each class, (K, 3).
        class_names: K names.
        title: one line above the tiles.

    Raises:
        UserError: sizes differ, or a mask holds values outside the classes.
    """
    if label is not None and label.shape != prediction.shape:
        raise UserError(
            f"A label of {label.shape} pixels (height, width) and a prediction of {prediction.shape}: expected equal "
            "sizes. Predict at the label's own size."
        )
    size, columns = tile_layout(prediction.shape)
    canvas = np.full((size[1], size[0], 3), 255, np.uint8)
    shown = canvas if image is None else np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    alpha = 0.62 if image is not None else 1.0
    grown_prediction = grow(prediction, size)
    tiles: list[tuple[str, Pixels]] = [] if image is None else [("image", shown)]
    if label is not None:
        grown_label = grow(label, size)
        tiles.append(("label", _hatched(overlay(shown, grown_label, palette, alpha), grown_label)))
    tiles.append(("prediction", overlay(shown, grown_prediction, palette, alpha)))
    if label is not None:
        tiles.append(_error_tile(shown, label, prediction, size))
    return compose(tiles, columns, _legend(label, prediction, palette, class_names), title)


def tile_layout(shape: Sequence[int]) -> tuple[tuple[int, int], int]:
    """(width, height) of a tile, and tiles per row: two for wide images, where four would be too small to read."""
    height, width = shape
    wide = width >= 1.7 * height
    box_width, box_height = (690, 400) if wide else (350, 340)
    scale = min(box_width / width, box_height / height, 8.0)
    return (max(1, round(width * scale)), max(1, round(height * scale))), 2 if wide else 4


def grow(mask: NDArray[Value], size: tuple[int, int]) -> NDArray[Value]:
    """To the tile's (width, height) without mixing classes."""
    rows = np.arange(size[1]) * mask.shape[0] // size[1]
    columns = np.arange(size[0]) * mask.shape[1] // size[0]
    grown: NDArray[Value] = mask[rows[:, None], columns[None, :]]
    return grown


def _hatched(tile: Pixels, mask: Mask) -> Pixels:
    """Ignored pixels under thin diagonals: neither black nor white would do, classes have those colours."""
    rows, columns = np.indices(mask.shape)
    stripe = (rows + columns) % 7 < 2
    ignored = mask == IGNORE_INDEX
    tile = tile.copy()
    tile[ignored] = (tile[ignored].astype(np.float32) * 0.5 + 90).astype(np.uint8)
    tile[ignored & stripe] = 245
    return tile


def _error_tile(shown: Pixels, label: Mask, prediction: Mask, size: tuple[int, int]) -> tuple[str, Pixels]:
    """A pale grey image with the wrong pixels in red, and its caption with their share."""
    counted = label != IGNORE_INDEX
    wrong = counted & (label != prediction)
    grey = shown.astype(np.float32).mean(axis=2, keepdims=True).repeat(3, axis=2)
    tile = (0.45 * grey + 140).astype(np.uint8)
    where = grow(wrong.astype(np.uint8), size) > 0
    tile[where] = (0.25 * tile[where] + 0.75 * np.array(WRONG)).astype(np.uint8)
    share = f"{100 * wrong.sum() / counted.sum():.1f} % wrong" if counted.any() else "nothing labelled"
    return f"errors ({share})", _hatched(tile, grow(label, size))


def _legend(
    label: Mask | None, prediction: Mask, palette: Pixels, class_names: Sequence[str]
) -> list[tuple[str, Colour | None]]:
    """(name, colour) of the classes that occur, most pixels first; the colour None is the hatching."""
    masks = [prediction] if label is None else [label, prediction]
    values, counts = np.unique(np.concatenate([mask.ravel() for mask in masks]), return_counts=True)
    order = [int(value) for value in values[np.argsort(-counts, kind="stable")]]
    entries: list[tuple[str, Colour | None]] = []
    for value in order:
        if value != IGNORE_INDEX:
            name = class_names[value] if value < len(class_names) else f"class {value}"
            red, green, blue = (int(channel) for channel in palette[value])
            entries.append((name, (red, green, blue)))
    if len(entries) > LEGEND_MAX:
        entries = [*entries[:LEGEND_MAX], (f"and {len(entries) - LEGEND_MAX} more", (255, 255, 255))]
    if label is not None and IGNORE_INDEX in order:
        entries.append(("ignored", None))
    return entries
