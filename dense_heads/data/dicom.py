"""A DICOM series as a volume: slices in order, in the scanner's units, with the affine that NIfTI would have."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from dense_heads.data.volumes import Array, Frame, Volume
from dense_heads.errors import UserError

_TO_RAS = np.diag([-1.0, -1.0, 1.0])  # DICOM's x points to the patient's left and its y to the back
_HOW = "Convert the series with dcm2niix and give the NIfTI file."


def is_series(folder: Path) -> bool:
    """Whether a folder directly holds DICOM files, by the four letters behind their preamble."""
    return folder.is_dir() and any(_is_dicom(path) for path in sorted(folder.iterdir()))


def read_frame(folder: Path) -> Frame:
    """Where the series' voxels lie, without decoding pixels.

    Raises:
        UserError: as `read_series`.
    """
    slices = _sorted_slices(folder, pixels=False)
    return Frame((int(slices[0].Columns), int(slices[0].Rows), len(slices)), _affine(slices, folder))


def read_series(folder: Path) -> Volume:
    """The one series in a folder as float32 (1, X, Y, Z), x along rows, y along columns, z from slice to slice.

    Rescale slope and intercept are applied (Hounsfield units for CT); where low values are white (MONOCHROME1) the
    values are turned round.

    Raises:
        UserError: no series or several, unreadable files, slices of different sizes or directions, a gap between
            slices, colour, several frames in one file, or compression that no installed decoder reads.
    """
    slices = _sorted_slices(folder, pixels=True)
    planes = []
    for dataset in slices:
        try:
            pixels = dataset.pixel_array.astype(np.float32)
        except Exception as error:  # decoders differ in how they fail
            syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
            named = getattr(syntax, "name", "unknown")
            raise UserError(
                f"{dataset.filename}: its pixels cannot be decoded ({named}): {' '.join(str(error).split())[:200]} "
                f"{_HOW}"
            ) from error
        if pixels.ndim != 2:
            raise UserError(f"{dataset.filename}: pixels of shape {pixels.shape}; expected one grey slice. {_HOW}")
        pixels = pixels * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
        planes.append(pixels.T)  # rows and columns -> x and y
    values = np.stack(planes, axis=-1)
    if slices[0].get("PhotometricInterpretation") == "MONOCHROME1":
        values = values.max() + values.min() - values
    if not np.isfinite(values).all():
        raise UserError(f"{folder}: values that are not finite (rescale slope or intercept). {_HOW}")
    return Volume(values[None], _affine(slices, folder), (str(slices[0].get("Modality", "")),))


def _sorted_slices(folder: Path, pixels: bool) -> list[Any]:
    slices = _read_files(folder, pixels)
    series = Counter(str(dataset.get("SeriesInstanceUID", "")) for dataset in slices)
    if len(series) > 1:
        listed = ", ".join(f"{uid[-12:]} ({count} files)" for uid, count in series.most_common(5))
        raise UserError(
            f"{folder} holds {len(series)} DICOM series: ...{listed}. Expected one; put each into a folder of its own."
        )
    for key in ("Rows", "Columns", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing"):
        without = [dataset.filename for dataset in slices if key not in dataset]
        if without:
            raise UserError(
                f"{without[0]}: no {key}, so its place in space is not known ({len(without)} of {len(slices)} files). "
                f"Expected a plain CT or MR series with one slice in each file. {_HOW}"
            )
    first = slices[0]
    for dataset in slices:
        same = (dataset.Rows, dataset.Columns) == (first.Rows, first.Columns)
        turned = np.abs(_numbers(dataset, "ImageOrientationPatient") - _numbers(first, "ImageOrientationPatient")).max()
        scaled = np.abs(_numbers(dataset, "PixelSpacing") - _numbers(first, "PixelSpacing")).max()
        if not (same and turned < 1e-3 and scaled < 1e-3):
            raise UserError(
                f"{dataset.filename}: size, direction or pixel spacing differ from {first.filename}. Expected slices "
                "of one stack; put scouts and other stacks into folders of their own."
            )
    return sorted(slices, key=lambda dataset: float(_normal(first) @ _numbers(dataset, "ImagePositionPatient")))


def _read_files(folder: Path, pixels: bool) -> list[Any]:
    try:
        import pydicom
    except ImportError as error:
        raise UserError("DICOM needs pydicom, which is not installed: pip install 'dense-heads[medical]'.") from error
    slices = []
    for path in sorted(folder.iterdir()):
        if not _is_dicom(path):
            continue
        try:
            dataset = pydicom.dcmread(path, stop_before_pixels=not pixels)
        except Exception as error:
            raise UserError(f"{path}: not readable as DICOM ({error}). Copy it again, or remove it.") from error
        if dataset.get("Modality") in ("SEG", "RTSTRUCT") or int(dataset.get("NumberOfFrames", 1) or 1) > 1:
            what = f"{dataset.get('Modality')}, {dataset.get('NumberOfFrames', 1)} frames"
            raise UserError(f"{path}: {what}; expected one slice of an image series in each file. {_HOW}")
        slices.append(dataset)
    if not slices:
        raise UserError(f"{folder}: no DICOM files in this folder. Expected one file for each slice of a series.")
    return slices


def _affine(slices: list[Any], folder: Path) -> Array:
    """(4, 4), voxel (x, y, z) -> mm in RAS+ (DICOM part 3, C.7.6.2.1.1)."""
    first = slices[0]
    along_row, along_column = _numbers(first, "ImageOrientationPatient").reshape(2, 3)
    between_rows, between_columns = _numbers(first, "PixelSpacing")
    start = _numbers(first, "ImagePositionPatient")
    if len(slices) > 1:
        places = np.array([_numbers(dataset, "ImagePositionPatient") for dataset in slices])
        steps = np.diff(places, axis=0)
        step = (places[-1] - places[0]) / (len(slices) - 1)
        off = np.linalg.norm(steps - step, axis=1).max()
        if not np.linalg.norm(step) > 1e-4 or off > 0.1 * np.linalg.norm(step):
            at = int(np.linalg.norm(steps - step, axis=1).argmax())
            raise UserError(
                f"{folder}: slices at unequal distances: {np.linalg.norm(steps[at]):.3g} mm between "
                f"{Path(slices[at].filename).name} and {Path(slices[at + 1].filename).name}, "
                f"{np.linalg.norm(np.median(steps, axis=0)):.3g} mm elsewhere. A slice is missing or stands there "
                "twice; complete the series."
            )
    else:
        step = _normal(first) * float(first.get("SpacingBetweenSlices", first.get("SliceThickness", 1)) or 1)
    affine = np.eye(4)
    affine[:3] = _TO_RAS @ np.column_stack([along_row * between_columns, along_column * between_rows, step, start])
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{folder}: position, orientation and spacing of its slices span no volume. {_HOW}")
    return affine


def _normal(dataset: Any) -> Array:
    along_row, along_column = _numbers(dataset, "ImageOrientationPatient").reshape(2, 3)
    return np.cross(along_row, along_column)


def _numbers(dataset: Any, key: str) -> Array:
    expected = {"ImageOrientationPatient": 6, "ImagePositionPatient": 3, "PixelSpacing": 2}[key]
    numbers = np.array([float(value) for value in dataset[key].value or ()])
    if len(numbers) != expected:
        raise UserError(f"{dataset.filename}: {key} has {len(numbers)} numbers; expected {expected}. {_HOW}")
    return numbers


def _is_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.startswith("."):
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
