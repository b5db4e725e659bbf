"""What `mode=predict` leaves in the output folder: files for programs, and pictures for people."""

import logging
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dense_heads.data.labels import LabelRule
from dense_heads.errors import UserError
from dense_heads.models.card import Card
from dense_heads.report.depth_panel import depth_picture
from dense_heads.report.panel import overlay
from dense_heads.report.sheet import Pixels

log = logging.getLogger("dense_heads")

ASSUMED_VIEW = 60.0  # degrees from left to right, where no focal length is given


class Writer(Protocol):
    """Writes the prediction of one image."""

    def write(self, name: str, pixels: Any, prediction: Any) -> None:
        """`pixels` is what the model saw, `name` the image's path below the input folder, without suffix."""
        ...

    def close(self) -> None:
        """All images have been written."""
        return


class LabelWriter(Writer):
    """`labels/NAME.png` (class ids at the image's own size, with the classes' colours) and `overlays/NAME.png`."""

    def __init__(self, output: Path, card: Card, ids: str = "train") -> None:
        """`ids`: `train` (0 to K-1) or `raw` (the values of the data set's own files).

        Raises:
            UserError: neither of them.
        """
        if ids not in ("train", "raw"):
            raise UserError(f"output_ids={ids}; expected train (0 to K-1) or raw (the data set's own values).")
        self.output = output
        self.palette = np.array(card.colours, dtype=np.uint8)
        self.rule = LabelRule(**card.labels) if ids == "raw" else None

    def write(self, name: str, pixels: Pixels, prediction: NDArray[Any]) -> None:
        """Both files."""
        self.save("labels", name, self.label_map(prediction))
        self.save("overlays", name, Image.fromarray(overlay(pixels, prediction, self.palette)))

    def label_map(self, prediction: NDArray[Any]) -> Image.Image:
        """Class ids as a picture in the classes' colours, or the data set's own values."""
        if self.rule is not None:
            return Image.fromarray(self.rule.to_raw(prediction))
        labels = Image.fromarray(prediction.astype(np.uint8), mode="P")
        labels.putpalette(self.palette.tobytes())
        return labels

    def save(self, folder: str, name: str, picture: Image.Image) -> None:
        """As PNG into a folder of the output."""
        _save(self.output / folder / f"{name}.png", picture)


class DepthWriter(Writer):
    """`depth/NAME.png` (16-bit millimetres) and `pictures/NAME.png` (colours with a scale bar in metres).

    On request also `depth/NAME.npy` (float32 metres) and `points/NAME.ply` (a coloured point cloud, metres).
    """

    def __init__(self, output: Path, npy: bool = False, ply: bool = False, focal_px: float | None = None) -> None:
        """`focal_px`: focal length in pixels of the images; without it a view of 60 degrees is assumed, and said.

        Raises:
            UserError: a focal length that is none.
        """
        if focal_px is not None and not focal_px > 0:
            raise UserError(f"focal_px={focal_px}; expected pixels above 0, such as 518.86 for NYU's 640 x 480.")
        self.output, self.npy, self.ply, self.focal_px = output, npy, ply, focal_px
        if ply and focal_px is None:
            log.info("point clouds assume a view of %g degrees; say focal_px=... if you know it", ASSUMED_VIEW)

    def write(self, name: str, pixels: Pixels, prediction: NDArray[Any]) -> None:
        """All files; beyond 65.535 m the PNG holds 65535, the others do not end there."""
        millimetres = np.clip(np.rint(prediction * 1000), 0, 65535).astype(np.uint16)
        _save(self.output / "depth" / f"{name}.png", Image.fromarray(millimetres))
        _save(self.output / "pictures" / f"{name}.png", depth_picture(prediction))
        if self.npy:
            np.save(self.output / "depth" / f"{name}.npy", prediction.astype(np.float32))
        if self.ply:
            path = self.output / "points" / f"{name}.ply"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(point_cloud(pixels, prediction, self.focal_px))


def point_cloud(pixels: Pixels, depth_m: NDArray[Any], focal_px: float | None = None) -> bytes:
    """A binary PLY of one coloured point for each pixel: x right, y down, z forward, in metres.

    The camera's axis goes through the middle of the image; without `focal_px` a view of 60 degrees is assumed. The
    file's comment says which.
    """
    height, width = depth_m.shape
    assumed = width / 2 / math.tan(math.radians(ASSUMED_VIEW / 2))
    focal = assumed if focal_px is None else focal_px
    rows, columns = np.indices(depth_m.shape)
    points = np.empty(depth_m.size, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    x, y = (columns - (width - 1) / 2) * depth_m / focal, (rows - (height - 1) / 2) * depth_m / focal
    points["xyz"] = np.stack([x, y, depth_m], axis=-1).reshape(-1, 3)
    points["rgb"] = pixels.reshape(-1, 3)
    points = points[depth_m.ravel() > 0]
    source = f"assumed, a view of {ASSUMED_VIEW:g} degrees" if focal_px is None else "given"
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment metres; focal length {focal:.2f} pixels ({source})",
        f"element vertex {len(points)}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
        "end_header\n",
    ]
    return "\n".join(header).encode() + points.tobytes()


def _save(path: Path, picture: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
