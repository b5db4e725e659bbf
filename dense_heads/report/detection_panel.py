"""Objects drawn on their image: boxes with class and score, masks under them; panels of label and prediction."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import from_numpy

from dense_heads.ops import masks
from dense_heads.report.panel import tile_layout
from dense_heads.report.sheet import Colour, Pixels, compose, font

Found = Mapping[str, Any]  # of one image: boxes (n, 4), labels (n,); scores, iscrowd (n,); masks, mask_codes

SHOWN_SCORE = 0.5  # predictions below are not drawn: a hundred faint boxes hide the sure ones
_ALPHA = 0.45
_TEXT_MAX = 25  # objects beyond which only boxes are drawn


def draw_objects(
    image: Pixels,
    found: Found,
    palette: Pixels,
    class_names: Sequence[str],
    size: tuple[int, int] | None = None,
    min_score: float = SHOWN_SCORE,
) -> Pixels:
    """The image with its objects, at another (width, height) = `size` where one is given.

    Args:
        image: RGB (H, W, 3) uint8; boxes are in its pixels.
        found: boxes, labels; `scores` where they are predictions; `masks` inside the boxes (n, M, M) or at the image's
            pixels (n, H, W), or `mask_codes`; `iscrowd` is drawn dashed.
        palette: RGB of each class, (K, 3).
        class_names: K names.
        size: of the result.
        min_score: predictions below are left out.
    """
    height, width = image.shape[:2]
    size = (width, height) if size is None else size
    drawn = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)).astype(np.float32)
    scores = np.asarray(found["scores"]) if "scores" in found else None
    chosen = np.arange(len(found["boxes"])) if scores is None else np.flatnonzero(scores >= min_score)[::-1]
    colours = np.asarray(palette)[np.asarray(found["labels"], dtype=int)] if len(chosen) else np.zeros((0, 3))
    for place, mask in zip(chosen, _masks(found, chosen, (height, width)), strict=False):
        grown = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
        edge = grown & ~_eroded(grown)
        drawn[grown] += _ALPHA * (colours[place] - drawn[grown])
        drawn[edge] = colours[place]
    picture = Image.fromarray(drawn.round().astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    scale = np.array([size[0] / width, size[1] / height] * 2)
    letters = font(12)
    for place in chosen:
        box = [float(value) for value in np.asarray(found["boxes"][place], dtype=float) * scale]
        colour = (int(colours[place][0]), int(colours[place][1]), int(colours[place][2]))
        crowd = "iscrowd" in found and bool(found["iscrowd"][place])
        pen.rectangle([box[0], box[1], max(box[2] - 1, box[0]), max(box[3] - 1, box[1])], outline=colour, width=2)
        name = class_names[int(found["labels"][place])]
        text = "crowd" if crowd else name if scores is None else f"{name} {scores[place]:.2f}"
        if len(chosen) <= _TEXT_MAX:
            _tag(pen, text, box, colour, letters, size)
    return np.asarray(picture)


def detection_panel(
    image: Pixels,
    label: Found | None,
    prediction: Found,
    palette: Pixels,
    class_names: Sequence[str],
    title: str = "",
) -> Image.Image:
    """Image | label | prediction side by side, with a legend of the classes that occur.

    Args:
        image: RGB (H, W, 3) uint8.
        label: what is annotated, or None where nothing is known.
        prediction: what was found.
        palette: RGB of each class, (K, 3).
        class_names: K names.
        title: one line above the tiles.
    """
    tile, columns = tile_layout(image.shape[:2])
    tiles = [("image", np.asarray(Image.fromarray(image).resize(tile, Image.Resampling.LANCZOS)))]
    if label is not None:
        caption = f"label ({len(label['boxes'])} objects)"
        tiles.append((caption, draw_objects(image, label, palette, class_names, tile)))
    num = int((np.asarray(prediction["scores"]) >= SHOWN_SCORE).sum())
    caption = f"prediction ({num} with a score of {SHOWN_SCORE:g} or more)"
    tiles.append((caption, draw_objects(image, prediction, palette, class_names, tile)))
    return compose(tiles, columns, _legend(label, prediction, palette, class_names), title)


def _masks(found: Found, chosen: NDArray[Any], size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    if "mask_codes" in found:
        return [masks.decode(found["mask_codes"][place], size) for place in chosen]
    if "masks" not in found or not len(chosen):
        return []
    own = np.asarray(found["masks"])[chosen]
    if own.dtype == bool:
        return list(own)
    boxes = np.ascontiguousarray(np.asarray(found["boxes"])[chosen])
    return list(masks.pasted(from_numpy(own), from_numpy(boxes), size))


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


def _tag(
    pen: ImageDraw.ImageDraw, text: str, box: Sequence[float], colour: Colour, letters: Any, size: tuple[int, int]
) -> None:
    """The text on a chip of the class's colour above the box, or inside it at the upper border."""
    length = letters.getlength(text) + 4
    left = min(max(box[0], 0.0), max(size[0] - length, 0.0))
    upper = box[1] - 14 if box[1] >= 14 else box[1]
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 140
    pen.rectangle([left, upper, left + length, upper + 14], fill=colour)
    pen.text((left + 2, upper), text, (255, 255, 255) if dark else (0, 0, 0), letters)


def _legend(
    label: Found | None, prediction: Found, palette: Pixels, class_names: Sequence[str]
) -> list[tuple[str, Colour | None]]:
    shown = np.asarray(prediction["labels"])[np.asarray(prediction["scores"]) >= SHOWN_SCORE]
    known = np.asarray(label["labels"]) if label is not None else np.zeros(0, int)
    occurring, counts = np.unique(np.concatenate([shown, known]).astype(int), return_counts=True)
    order = occurring[np.argsort(-counts, kind="stable")][:30]
    return [(class_names[k], (int(palette[k][0]), int(palette[k][1]), int(palette[k][2]))) for k in order]
