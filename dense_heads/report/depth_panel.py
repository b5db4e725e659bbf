"""Depth in colours with a scale bar in metres, and panels of image, label, prediction and errors."""

from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dense_heads.errors import UserError
from dense_heads.report.panel import tile_layout
from dense_heads.report.sheet import INK, Pixels, compose, font

Depth = NDArray[np.floating[Any]]  # (H, W) metres, 0 where nothing was measured

NOT_MEASURED = (40, 40, 44)
LARGEST_ERROR = 0.5  # of the error tile's scale: |prediction - label| / label


def depth_colours(depth_m: Depth, near_m: float, far_m: float) -> Pixels:
    """Metres (H, W) -> RGB (H, W, 3): near is bright, far is dark; where nothing was measured dark grey."""
    share = np.clip((depth_m - near_m) / max(far_m - near_m, 1e-6), 0, 1)
    colours: Pixels = (matplotlib.colormaps["magma"](1 - share)[..., :3] * 255).round().astype(np.uint8)
    colours[depth_m <= 0] = NOT_MEASURED
    return colours


def depth_picture(depth_m: Depth, near_m: float | None = None, far_m: float | None = None) -> Image.Image:
    """Depth in colours at its own size, with a scale bar in metres below; the range is the map's own by default."""
    near, far = _range(depth_m)
    near, far = (near if near_m is None else near_m), (far if far_m is None else far_m)
    picture = Image.fromarray(depth_colours(depth_m, near, far))
    bar = _scale_bar(picture.width, near, far)
    sheet = Image.new("RGB", (picture.width, picture.height + bar.height), (255, 255, 255))
    sheet.paste(picture, (0, 0))
    sheet.paste(bar, (0, picture.height))
    return sheet


def depth_panel(image: Pixels | None, label: Depth | None, prediction: Depth, title: str = "") -> Image.Image:
    """Image | label | prediction | relative error side by side; label and prediction share one scale, drawn below.

    Raises:
        UserError: label and prediction differ in size.
    """
    if label is not None and label.shape != prediction.shape:
        raise UserError(
            f"A label of {label.shape} pixels (height, width) and a prediction of {prediction.shape}: expected equal "
            "sizes. Predict at the label's own size."
        )
    near, far = _range(prediction if label is None or not (label > 0).any() else label)
    size, columns = tile_layout(prediction.shape)
    tiles: list[tuple[str, Pixels]] = []
    if image is not None:
        tiles.append(("image", np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))))
    if label is not None:
        tiles.append(("label", _grown(depth_colours(label, near, far), size)))
    tiles.append(("prediction", _grown(depth_colours(prediction, near, far), size)))
    if label is not None:
        tiles.append(_error_tile(label, prediction, size))
    sheet = compose(tiles, columns, [], title)
    bar = _scale_bar(min(sheet.width - 32, 520), near, far)
    extended = Image.new("RGB", (sheet.width, sheet.height + bar.height), (255, 255, 255))
    extended.paste(sheet, (0, 0))
    extended.paste(bar, (16, sheet.height - 10))
    return extended


def _range(depth_m: Depth) -> tuple[float, float]:
    """Nearest and farthest of the measured pixels, a hundredth on each side left out."""
    measured = depth_m[depth_m > 0]
    if measured.size == 0:
        return 0.0, 1.0
    near, far = np.percentile(measured, [1, 99])
    return float(near), float(max(far, near + 1e-3))


def _error_tile(label: Depth, prediction: Depth, size: tuple[int, int]) -> tuple[str, Pixels]:
    valid = label > 0
    error = np.where(valid, np.abs(prediction - label) / np.where(valid, label, 1), 0)
    colours = (matplotlib.colormaps["Reds"](np.clip(error / LARGEST_ERROR, 0, 1))[..., :3] * 255).astype(np.uint8)
    colours[~valid] = NOT_MEASURED
    mean = f"abs_rel {error[valid].mean():.3f}" if valid.any() else "nothing measured"
    return f"errors ({mean})", _grown(colours, size)


def _grown(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """To a tile's (width, height) without mixing holes and surfaces."""
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def _scale_bar(width: int, near: float, far: float) -> Image.Image:
    """A bar of the colours from near to far, with its metres."""
    bar = Image.new("RGB", (width, 44), (255, 255, 255))
    values = np.tile(np.linspace(near, far, width), (14, 1))
    bar.paste(Image.fromarray(depth_colours(np.maximum(values, 1e-9), near, far)), (0, 4))
    draw = ImageDraw.Draw(bar)
    small = font(13)
    for share in (0.0, 0.5, 1.0):
        text = f"{near + share * (far - near):.2f} m"
        length = small.getlength(text)
        draw.text((min(max(share * width - length / 2, 0), width - length), 21), text, INK, small)
    return bar
