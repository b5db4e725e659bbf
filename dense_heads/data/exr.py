"""Depth in OpenEXR files, as renderers write it; needs the library OpenEXR, imported only here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.errors import UserError
from dense_heads.structures import Size

Array = npt.NDArray[Any]

_MAGIC = b"\x76\x2f\x31\x01"
_DEPTH_NAMES = ("z", "depth")  # the last part of a channel's name: `Z`, `ViewLayer.Depth.Z`
_LARGEST = 2**28  # pixels; beyond it the header is no depth map's


def exr_size(path: Path) -> Size:
    """(height, width) of the picture, from the header.

    Raises:
        UserError: no such file, no EXR file, or the library is not installed.
    """
    left, top, right, bottom = _window(_header(path), "displayWindow", path)
    return bottom - top, right - left


def read_exr(path: Path) -> Array:
    """The depth channel, (H, W) in the file's own type; 0, no measurement, where the file holds no pixels.

    Of several channels the one is taken that is called Z or depth; else all must be equal, alpha aside (many renderers
    write depth as grey RGB).

    Raises:
        UserError: no such file, damaged, several different channels, or the library is not installed.
    """
    header = _header(path)
    left, top, right, bottom = _window(header, "displayWindow", path)
    of_data = _window(header, "dataWindow", path)
    try:
        with _library(path).File(str(path), separate_channels=True) as file:
            pixels = _chosen({name: channel.pixels for name, channel in file.channels().items()}, path)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: the EXR file cannot be read: {error}. Copy or write it again.") from error
    if pixels.shape != (of_data[3] - of_data[1], of_data[2] - of_data[0]) or pixels.dtype.kind not in "fu":
        raise UserError(
            f"{path}: an EXR file with deep or thinned-out pixels; expected one depth for each. Flatten it."
        )
    if of_data == (left, top, right, bottom):
        return pixels
    whole = np.zeros((bottom - top, right - left), pixels.dtype)  # renderers crop away empty borders, or add some
    rows, columns = np.arange(of_data[1], of_data[3]) - top, np.arange(of_data[0], of_data[2]) - left
    inside_y, inside_x = (rows >= 0) & (rows < len(whole)), (columns >= 0) & (columns < whole.shape[1])
    whole[np.ix_(rows[inside_y], columns[inside_x])] = pixels[np.ix_(inside_y, inside_x)]
    return whole


def _chosen(channels: Mapping[str, Array], path: Path) -> Array:
    named = [name for name in channels if name.rsplit(".", 1)[-1].lower() in _DEPTH_NAMES]
    if len(named) == 1:
        return channels[named[0]]
    colours = [pixels for name, pixels in channels.items() if name.rsplit(".", 1)[-1] not in ("A", "alpha")]
    first, *others = colours or list(channels.values())
    if all(np.array_equal(first, other, equal_nan=True) for other in others):
        return first
    raise UserError(
        f"{path}: different channels, {', '.join(sorted(channels))[:200]}; expected one of depth, called Z or depth, "
        "or equal ones. Write the depth alone into the file."
    )


def _header(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a depth map. Check the path.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != _MAGIC:
        raise UserError(f"{path}: not an OpenEXR file. Expected a whole EXR file; copy or write it again.")
    try:
        with _library(path).File(str(path), header_only=True) as file:
            header: Mapping[str, Any] = dict(file.header())
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: the EXR file cannot be read: {error}. Copy or write it again.") from error
    return header


def _window(header: Mapping[str, Any], name: str, path: Path) -> tuple[int, int, int, int]:
    """left, top, right, bottom; the last two exclusive."""
    (left, top), (right, bottom) = ((int(corner[0]), int(corner[1])) for corner in header[name])
    right, bottom = right + 1, bottom + 1
    if not (left < right and top < bottom and (right - left) * (bottom - top) <= _LARGEST):
        raise UserError(
            f"{path}: an EXR file whose {name} is {bottom - top} x {right - left} pixels (H x W); expected a depth "
            "map. Copy or write it again."
        )
    return left, top, right, bottom


def _library(path: Path) -> Any:
    try:
        import OpenEXR
    except ImportError as error:
        raise UserError(
            f"{path}: EXR files need the library OpenEXR, which is not installed. Install it (pip install "
            "'dense-heads[exr]'), or convert the depths to .npy (float32) or 16-bit PNG."
        ) from error
    return OpenEXR
