"""Volumes on disk: NIfTI files with their geometry, views of them as slices, label maps written back.

Arrays are (X, Y, Z) as stored; an affine leads from voxels to millimetres, x to the patient's right, y to the front,
z up (RAS+, as NIfTI has it). Slices are cut from the volume turned so that a viewer sees what radiologists see,
whatever the axes in the file are: axial slices with the front on top and the patient's right on the left.
"""

import gzip
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.errors import UserError, unknown_name
from dense_heads.ops.files import write_atomically

Array = npt.NDArray[Any]
NIFTI_SUFFIXES = (".nii.gz", ".nii")
PLANES = ("sagittal", "coronal", "axial")

_TRAILING = 2**16  # bytes that may follow the voxels: extensions of other programs
_LARGEST = 2**31  # voxels: beyond it a header is broken or hostile
_VIEWED_AS = ("L", "P", "I")  # where the turned axes point: to the left, to the back, down
_OPPOSITE = {"L": "R", "P": "A", "I": "S"}
# Of the turned axes: the one that slices are taken along, that of the rows, that of the columns.
_LAID_OUT = {"sagittal": (0, 2, 1), "coronal": (1, 2, 0), "axial": (2, 1, 0)}


@dataclass(frozen=True)
class Volume:
    """One examination: values (C, X, Y, Z) as stored, one channel for each modality, and where they lie."""

    values: Array
    affine: Array  # (4, 4) float64, voxel -> mm
    modalities: tuple[str, ...] = ()  # `CT`, `MRI`, ...; empty where nothing says
    header: Any = field(default=None, repr=False)  # of NIfTI, for what is written back


@dataclass(frozen=True)
class Frame:
    """Where a volume's voxels lie: what its header says."""

    shape: tuple[int, int, int]
    affine: Array

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along each stored axis."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).tolist()
        return x, y, z


@dataclass(frozen=True)
class SliceView:
    """A volume as a stack of slices (S, H, W), and back."""

    order: tuple[int, int, int]  # the stored axis of slices, rows, columns
    flips: tuple[bool, bool, bool]  # whether it is walked backwards
    spacing: tuple[float, float, float]  # mm between slices, rows, columns
    edges: tuple[str, str]  # what lies at the left and at the upper edge of a slice: R, A or S

    def stored_index(self, index: int, num_slices: int) -> int:
        """The number that a slice has in the file, as other viewers count."""
        return num_slices - 1 - index if self.flips[0] else index

    def slices(self, stored: Array) -> Array:
        """(..., X, Y, Z) -> (..., S, H, W)."""
        before = stored.ndim - 3
        turned = stored.transpose(*range(before), *(before + axis for axis in self.order))
        s, h, w = self._steps()
        return turned[..., s, h, w]

    def stored(self, slices: Array) -> Array:
        """(S, H, W) -> (X, Y, Z), the inverse of `slices`."""
        turned = slices[self._steps()]
        back: Array = np.ascontiguousarray(turned.transpose(*np.argsort(self.order)))
        return back

    def _steps(self) -> tuple[slice, slice, slice]:
        s, h, w = (slice(None, None, -1 if flip else 1) for flip in self.flips)
        return s, h, w


def view_of(frame: Frame, plane: str | None = None) -> SliceView:
    """How the volume is cut into slices.

    Args:
        frame: where its voxels lie.
        plane: sagittal | coronal | axial; None cuts across the axis with the coarsest spacing (where there are several,
            the first of axial, coronal, sagittal), so that each slice is as fine as the volume allows.
    """
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    if plane is not None and plane not in PLANES:
        raise unknown_name("plane of slices", str(plane), PLANES)
    turn = ornt_transform(io_orientation(frame.affine), axcodes2ornt(_VIEWED_AS))  # stored axis -> (turned axis, sign)
    stored = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in range(3)]  # turned axis -> stored axis
    spacing = [frame.spacing[axis] for axis in stored]
    if plane is None:
        coarsest = max(spacing)
        plane = next(p for p in reversed(PLANES) if spacing[_LAID_OUT[p][0]] >= coarsest * (1 - 1e-3))
    s, h, w = _LAID_OUT[plane]
    order = stored[s], stored[h], stored[w]
    flips = tuple(bool(turn[axis, 1] < 0) for axis in order)
    edges = _OPPOSITE[_VIEWED_AS[w]], _OPPOSITE[_VIEWED_AS[h]]
    return SliceView(order, (flips[0], flips[1], flips[2]), (spacing[s], spacing[h], spacing[w]), edges)


def is_nifti(path: Path) -> bool:
    """Whether the name is that of a NIfTI file."""
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def case_name(path: Path) -> str:
    """The file's name without the suffixes of NIfTI."""
    for suffix in NIFTI_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def read_frame(path: Path) -> Frame:
    """Where the voxels of a NIfTI file lie, from its header alone.

    Raises:
        UserError: unreadable, no volume, or an affine that places its voxels nowhere.
    """
    return _frame(_open(path), path)


def read_nifti(path: Path) -> Volume:
    """A NIfTI file as float32 with its scaling applied; the fourth dimension, if there is one, is channels.

    Values that are not finite become the smallest finite one of their channel.

    Raises:
        UserError: unreadable, truncated, no volume, not one finite value.
    """
    image = _open(path)
    frame = _frame(image, path)
    values = _values(image, path).astype(np.float32).reshape(*frame.shape, -1)
    values = np.moveaxis(values, -1, 0)
    for channel in values:
        finite = np.isfinite(channel)
        if not finite.any():
            raise UserError(f"{path}: not one voxel has a finite value. The file is broken; get it again.")
        if not finite.all():
            channel[~finite] = channel[finite].min()
    return Volume(values, frame.affine, header=image.header)


def read_label_volume(path: Path, beside: Frame, image: Path) -> Array:
    """Raw labels (X, Y, Z) of the volume `image`, as whole numbers.

    Raises:
        UserError: unreadable, another shape, another place in space, or values that are no whole numbers.
    """
    opened = _open(path)
    frame = _frame(opened, path)
    check_same_place(frame, beside, path, image)
    raw = _values(opened, path).reshape(frame.shape)
    if not np.issubdtype(raw.dtype, np.integer):
        rounded = np.round(raw)
        if not (np.isfinite(raw).all() and np.abs(raw - rounded).max() < 1e-3):
            raise UserError(f"{path}: label values that are no whole numbers (from {raw.min():g} to {raw.max():g}).")
        raw = rounded.astype(np.int64)
    return raw


def check_same_place(label: Frame, image: Frame, label_path: Path, image_path: Path) -> None:
    """Refuse a label volume that does not lie where its image does, by more than a tenth of a voxel.

    Raises:
        UserError: another shape or affine, with both.
    """
    fix = "Resample the label onto the image's grid (nearest neighbour), or remove the pair."
    if label.shape != image.shape:
        raise UserError(
            f"{label_path} has {_by(label.shape)} voxels and its image {image_path} {_by(image.shape)}; expected equal "
            f"shapes. {fix}"
        )
    corners = np.array([[x, y, z, 1] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.float64)
    corners[:, :3] *= np.array(image.shape) - 1
    distance = np.linalg.norm(corners @ (label.affine - image.affine)[:3].T, axis=1).max()
    if not distance <= 0.1 * min(image.spacing):
        raise UserError(
            f"{label_path} lies {distance:.3g} mm away from its image {image_path} at the farthest corner: their "
            f"affines differ.\n  label: {_matrix(label.affine)}\n  image: {_matrix(image.affine)}\nExpected equal "
            f"affines. {fix}"
        )


def write_labels(path: Path, labels: Array, volume: Volume) -> None:
    """Write a label map (X, Y, Z) as NIfTI in the geometry of `volume`: same affine, shape and orientation."""
    import nibabel

    stored = labels.astype(np.uint8 if labels.max(initial=0) <= 255 else np.uint16)
    kind = type(volume.header) if volume.header is not None else nibabel.Nifti1Header
    header = None
    if volume.header is not None:
        header = volume.header.copy()
        header.set_data_dtype(stored.dtype)
        header.set_slope_inter(1, 0)
        header["cal_min"], header["cal_max"] = 0, 0  # the window of the image's grey values
    image_class = nibabel.Nifti2Image if kind is nibabel.Nifti2Header else nibabel.Nifti1Image
    image = image_class(stored, volume.affine, header)
    if header is None:
        image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    # Without a time stamp: the same labels are the same bytes.
    write_atomically(path, gzip.compress(content, mtime=0) if path.name.lower().endswith(".gz") else content)


def _open(path: Path) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise UserError("Volumes need nibabel, which is not installed: pip install 'dense-heads[medical]'.") from error
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a NIfTI volume. Check the path.")
    try:
        image = nibabel.load(path)
    except Exception as error:  # a broken header fails in any way it likes
        raise _unreadable(path, error) from error
    if not isinstance(image, nibabel.Nifti1Image):  # Nifti2Image is one too
        raise UserError(f"{path}: a {type(image).__name__}; expected NIfTI (.nii or .nii.gz).")
    return image


def _frame(image: Any, path: Path) -> Frame:
    shape = tuple(int(side) for side in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    spatial = (*shape[:3], *(1,) * (3 - len(shape)))
    if not 2 <= len(shape) <= 4 or min(shape) < 1 or np.prod(shape, dtype=np.float64) > _LARGEST:
        raise UserError(
            f"{path}: an array of {_by(shape)}; expected a volume of three dimensions, or four with channels last."
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(
            f"{path}: its affine places the voxels nowhere: {_matrix(affine)}. Expected a matrix with three "
            "independent axes. Correct the header (qform, sform)."
        )
    return Frame((spatial[0], spatial[1], spatial[2]), affine)


def _values(image: Any, path: Path) -> Array:
    try:
        values: Array = np.asanyarray(_checked_whole(image, path).dataobj)
    except Exception as error:  # truncated, or compressed data that are damaged
        raise _unreadable(path, error) from error
    if values.dtype.fields is not None or np.issubdtype(values.dtype, np.complexfloating):
        raise UserError(f"{path}: voxels of type {values.dtype}; expected one real number each.")
    return np.array(values)  # not a memory map of a file that may change


def _checked_whole(image: Any, path: Path) -> Any:
    """The image; a compressed one is read to its end, where its checksum stands, which nibabel alone would not."""
    if not path.name.lower().endswith(".gz"):
        return image
    most = int(image.dataobj.offset) + int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    with gzip.open(path) as file:
        content = file.read(most)
        if len(file.read(_TRAILING + 1)) > _TRAILING:
            raise ValueError(f"more than the {most} bytes that its header tells of")
    return type(image).from_bytes(content)


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(
        f"{path}: not readable as NIfTI ({reason}); {path.stat().st_size} bytes. It is damaged or cut short: copy or "
        "download it again, or remove it."
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)


def _matrix(affine: Array) -> str:
    return np.array2string(affine[:3], precision=4, suppress_small=True, separator=" ").replace("\n", "")
