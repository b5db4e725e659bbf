"""Contours over grey images, and volumes as sheets of slices."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dense_heads.data.volumes import SliceView
from dense_heads.report.panel import grow
from dense_heads.report.sheet import Colour, Pixels, compose, font
from dense_heads.structures import IGNORE_INDEX

Labels = NDArray[np.integer[Any]]  # (H, W) or (S, H, W) class ids; with several labels (K, ...) of 0 and 1

LABEL = (255, 255, 255)  # outlines of what experts drew
TILE = 210  # pixels, the longer side of a slice on a sheet
MOST_SLICES = 12


def outlined(image: Pixels, masks: Sequence[NDArray[np.bool_]], colours: Sequence[Colour], width: int = 1) -> Pixels:
    """The image (H, W, 3) with the outline of each mask (H, W), drawn inside it, `width` pixels wide."""
    drawn = image
    for mask, colour in zip(masks, colours, strict=True):
        drawn = outlined_objects(drawn, mask.astype(np.uint8), colour, width)
    return drawn


def outlined_objects(image: Pixels, objects: Labels, colour: Colour, width: int = 1) -> Pixels:
    """The image (H, W, 3) with the outline of each object (H, W; 0 is none), also between two that touch."""
    inner = np.where(objects > 0, objects.astype(np.int64), -1)
    for _ in range(width):
        around = np.pad(inner, 1, constant_values=-1)
        same = [around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]]
        inner = np.where(np.all([neighbour == inner for neighbour in same], axis=0), inner, -1)
    drawn = image.copy()
    drawn[(objects > 0) & (inner < 0)] = colour
    return drawn


def class_masks(labels: Labels, num_classes: int, multilabel: bool) -> list[NDArray[np.bool_]]:
    """One mask for each class that is drawn: all but the background, or each of several labels."""
    if multilabel:
        return [labels[index] == 1 for index in range(num_classes)]
    return [labels == index for index in range(1, num_classes)]


def contour_panel(
    image: Pixels,
    label: Labels | None,
    prediction: Labels,
    palette: Pixels,
    class_names: Sequence[str],
    title: str = "",
    multilabel: bool = False,
    objects: bool = False,
) -> Image.Image:
    """Image | label | prediction | both: outlines in the classes' colours, and over each other for comparison.

    Args:
        image: RGB (H, W, 3) uint8.
        label: class ids (H, W), with several labels (K, H, W); None where nothing is known.
        prediction: the same.
        palette: RGB of each class, (K, 3).
        class_names: K names.
        title: one line above the tiles.
        multilabel: whether pixels can have several labels.
        objects: label and prediction are numbered objects of the one class.
    """
    height, width = image.shape[:2]
    scale = min(420 / height, 420 / width, 8.0)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    colours = drawn_colours(palette, multilabel)

    def drawn(on: Pixels, labels: Labels, colours: Sequence[Colour], width: int) -> Pixels:
        if objects:
            return outlined_objects(on, grow(labels, size), colours[0], width)
        masks = [grow(mask, size) for mask in class_masks(labels, len(palette), multilabel)]
        return outlined(on, masks, colours, width)

    tiles = [("image", shown)]
    if label is not None:
        tiles.append(("label", drawn(shown, label, colours, 2)))
    tiles.append(("prediction", drawn(shown, prediction, colours, 2)))
    if label is not None:
        both = drawn(tiles[-1][1], label, [LABEL] * len(colours), 1)
        tiles.append(("prediction, label in white", both))
    return compose(tiles, 2, legend(palette, class_names, multilabel), title)


def montage(
    grey: NDArray[np.floating[Any]],
    label: Labels | None,
    prediction: Labels,
    view: SliceView,
    palette: Pixels,
    class_names: Sequence[str],
    title: str = "",
    multilabel: bool = False,
) -> Image.Image:
    """Slices of a volume with outlines: the prediction in the classes' colours, the label in white.

    Slices have their true proportions, the numbers that the file gives them, and letters at the edges: R the patient's
    right, A front, S above.

    Args:
        grey: (S, H, W), 0 to 1.
        label: class ids (S, H, W), with several labels (K, S, H, W); None where nothing is known.
        prediction: the same.
        view: how the volume was cut.
        palette: RGB of each class, (K, 3).
        class_names: K names.
        title: one line above the slices.
        multilabel: whether voxels can have several labels.
    """
    found = class_masks(prediction, len(palette), multilabel)
    known = [] if label is None else class_masks(label, len(palette), multilabel)
    chosen = chosen_slices(np.any(np.stack([*found, *known]), axis=0))
    size = tile_size(grey.shape[1:], view.spacing[1:])
    colours = drawn_colours(palette, multilabel)
    tiles = []
    for index in chosen:
        plane = np.repeat((255 * grey[index, ..., None]).round().astype(np.uint8), 3, axis=2)
        shown = np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
        shown = outlined(shown, [grow(mask[index], size) for mask in found], colours, 2)
        shown = outlined(shown, [grow(mask[index], size) for mask in known], [LABEL] * len(known))
        tiles.append((f"slice {view.stored_index(index, len(grey))}", with_edges(shown, view.edges)))
    entries = legend(palette, class_names, multilabel)
    return compose(tiles, 6, [*entries, *([("label", LABEL)] if known else [])], title)


def tile_size(shape: Sequence[int], spacing: Sequence[float]) -> tuple[int, int]:
    """(width, height) on a sheet of slices of `shape` (H, W) with `spacing` mm between rows and between columns."""
    finest = min(spacing)
    height, width = (num * mm / finest for num, mm in zip(shape, spacing, strict=True))
    scale = min(TILE / max(height, width), 8.0)
    return max(1, round(width * scale)), max(1, round(height * scale))


def with_edges(image: Pixels, edges: tuple[str, str]) -> Pixels:
    """The image (H, W, 3) with a letter at its left and one at its upper edge."""
    drawn = Image.fromarray(image)
    draw, letters = ImageDraw.Draw(drawn), font(12, bold=True)
    left, top = (4, drawn.height / 2), (drawn.width / 2, 3)
    for place, letter, anchor in ((left, edges[0], "lm"), (top, edges[1], "mt")):
        draw.text(place, letter, LABEL, letters, anchor=anchor, stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(drawn)


def chosen_slices(occupied: NDArray[np.bool_]) -> list[int]:
    """At most 12 slices, spread over those with something on them; of an empty volume over all of it.

    A hundredth of the voxels at either end is left out, so that specks far away do not take the place of the organ.
    """
    upto = np.cumsum(occupied.sum(axis=(1, 2)))
    first, last = 0, len(occupied) - 1
    if upto[-1]:
        first = int(np.searchsorted(upto, 0.01 * upto[-1], "right"))
        last = int(np.searchsorted(upto, 0.99 * upto[-1], "left"))
    return sorted(set(np.linspace(first, last, MOST_SLICES).round().astype(int).tolist()))


def drawn_colours(palette: Pixels, multilabel: bool) -> list[Colour]:
    """The colours of `class_masks`."""
    return [(int(r), int(g), int(b)) for r, g, b in palette[0 if multilabel else 1 :]]


def legend(palette: Pixels, class_names: Sequence[str], multilabel: bool) -> list[tuple[str, Colour | None]]:
    """Name and colour of each class that is drawn."""
    names = list(class_names)[0 if multilabel else 1 :]
    return list(zip(names, drawn_colours(palette, multilabel), strict=True))


def without_ignored(labels: Labels) -> Labels:
    """Ignored pixels as background, for drawing."""
    return np.where(labels == IGNORE_INDEX, 0, labels)
