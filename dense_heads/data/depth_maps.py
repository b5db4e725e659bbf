"""Depth files of any kind as float32 metres, and saying clearly why one cannot be read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.data.exr import exr_size, read_exr
from dense_heads.data.images import image_size, open_image, upright
from dense_heads.errors import UserError, unknown_name
from dense_heads.structures import Size

Array = npt.NDArray[Any]
DEPTH_SUFFIXES = frozenset({".exr", ".npy", ".pgm", ".png", ".tif", ".tiff"})
ENCODINGS = ("plain", "sun_rgbd")
_SUN_LARGEST = 8000  # millimetres, where SUN RGB-D's own toolbox cuts


@dataclass(frozen=True)
class DepthRule:
    """How a data set stores its depths: the only place where file values get their meaning.

    Args:
        scale: units of the files for one metre: 1000 for millimetres, 256 for KITTI, 1 for metres.
        invalid: file value or values that mean "no measurement", before scaling. Zero, negative values, nan and inf
            always do.
        encoding: `plain`; or `sun_rgbd`: 16-bit values rotated by three bits and cut at 8 m, as SUN RGB-D's toolbox
            reads them.

    Raises:
        UserError: a value that makes no sense.
    """

    scale: float = 1000.0
    invalid: float | Sequence[float] = 0
    encoding: str = "plain"

    def __post_init__(self) -> None:
        """Refuse values that would turn every depth into nonsense."""
        if not _is_number(self.scale) or not (math.isfinite(self.scale) and self.scale > 0):
            raise UserError(
                f"data.depth_scale is {self.scale!r}; expected units of the files for one metre, such as "
                "1000 for millimetres or 1 for metres."
            )
        values = tuple(self.invalid) if isinstance(self.invalid, Sequence) else (self.invalid,)
        if isinstance(self.invalid, str) or not all(_is_number(value) for value in values):
            raise UserError(
                f"task.data.depth.invalid is {self.invalid!r}; expected a value of the files that means `no "
                "measurement`, or a list of such values, such as 0 or [0, 65535]."
            )
        if self.encoding not in ENCODINGS:
            raise unknown_name("encoding of depths", str(self.encoding), ENCODINGS)
        object.__setattr__(self, "invalid", values)  # hashable, whatever was given

    def read(self, path: Path) -> npt.NDArray[np.float32]:
        """A depth file as (H, W) float32 metres, 0 = no measurement.

        Raises:
            UserError: unreadable, or no single map of numbers; names the file.
        """
        raw = _read_raw(path)
        if self.encoding == "sun_rgbd":
            if raw.dtype != np.uint16:
                raise UserError(
                    f"{path}: {raw.dtype} values; expected 16-bit PNG for task.data.depth.encoding=sun_rgbd. Set "
                    "encoding=plain for files that hold their depths plainly."
                )
            raw = np.minimum((raw >> 3) | (raw << 13), _SUN_LARGEST).astype(np.uint16)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes inf, and then no measurement
            depth_m: npt.NDArray[np.float32] = (raw.astype(np.float64) / self.scale).astype(np.float32)
        assert isinstance(self.invalid, tuple)
        for value in self.invalid:  # in the files' own precision: 0.1 is another number in float32
            depth_m[raw == (raw.dtype.type(value) if raw.dtype.kind == "f" else value)] = 0
        depth_m[~(np.isfinite(depth_m) & (depth_m > 0))] = 0
        return depth_m

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values, so that a card can keep them."""
        assert isinstance(self.invalid, tuple)
        return {"scale": self.scale, "invalid": list(self.invalid), "encoding": self.encoding}


def read_depth(
    path: str | Path, scale: float, invalid: float | Sequence[float] = 0, encoding: str = "plain"
) -> npt.NDArray[np.float32]:
    """Read one depth file as (H, W) float32 metres, 0 = no measurement; the arguments are those of `DepthRule`.

    PNG, PGM and TIFF with one channel of 8, 16 or 32 bits or float; `.npy` arrays (H, W); OpenEXR with the
    library of that name.

    Raises:
        UserError: no such file, truncated, several channels, no numbers, or a value that makes no sense.
    """
    return DepthRule(scale, invalid, encoding).read(Path(path))


def depth_size(path: Path) -> Size:
    """(height, width) of a depth file, from the header alone where its format has one that says it.

    Raises:
        UserError: no such file, or not a depth map.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        height, width = _open_npy(path).shape
        return int(height), int(width)
    if suffix == ".exr":
        return exr_size(path)
    return image_size(path)


def _read_raw(path: Path) -> Array:
    """The stored values, (H, W) in the machine's own byte order."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        raw = np.array(_open_npy(path))
    elif suffix == ".exr":
        raw = read_exr(path)
    else:
        with open_image(path) as image:
            if image.format == "JPEG":
                raise UserError(
                    f"{path}: depth in a JPEG file, which changes values. Expected 16-bit PNG, .npy, EXR or TIFF. "
                    "Export the depths again."
                )
            if image.mode not in ("L", "I", "F") and not image.mode.startswith("I;"):
                raise UserError(
                    f"{path}: a picture of mode {image.mode} ({', '.join(image.getbands())}); expected one channel of "
                    "depths. A coloured picture of depth cannot be turned back; export the depths themselves, as "
                    "16-bit PNG, .npy, EXR or TIFF."
                )
            raw = np.asarray(upright(image))
    return raw.astype(raw.dtype.newbyteorder("="), copy=False)


def _open_npy(path: Path) -> Array:
    """The array of a `.npy` file, (H, W), mapped: a broken header cannot ask for more memory than the file has."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a depth map. Check the path.")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy's parser of headers raises almost anything
        raise UserError(
            f"{path}: the array cannot be read: {error or type(error).__name__}. Expected a whole .npy file of numbers "
            "(numpy.save). Write or copy it again."
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif":
        held = array.dtype if isinstance(array, np.ndarray) else "several arrays (.npz)"
        raise UserError(f"{path}: holds {held}; expected one array of real numbers. Save the depths with numpy.save.")
    squeezed = array.squeeze() if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]) else array
    if squeezed.ndim != 2 or squeezed.size == 0:
        raise UserError(f"{path}: an array of shape {array.shape}; expected one depth map (H, W), one file for each.")
    return squeezed


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
