import gzip
import os

import numpy as np
import pytest

from dense_heads.data import dicom
from dense_heads.data.intensity import Intensity
from dense_heads.data.slices import Cut
from dense_heads.data.volumes import (
    Frame,
    Volume,
    read_frame,
    read_label_volume,
    read_nifti,
    view_of,
    write_labels,
)
from dense_heads.errors import UserError
from tests.volumes import affine_of, fake_volume, save_dicom, save_nifti

nibabel = pytest.importorskip("nibabel")

AXES = ["RAS", "LPI", "ASR", "SLP", "PIR", "IRA", "LAS"]


def restored(array, affine, axes):
    """The same volume with its stored axes pointing elsewhere, by nibabel itself."""
    image = nibabel.Nifti1Image(array, affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.io_orientation(affine), nibabel.orientations.axcodes2ornt(axes)
    )  # fmt: skip
    turned = image.as_reoriented(turn)
    return np.asarray(turned.dataobj), turned.affine


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("turned", [0.0, 0.3])
def test_slices_do_not_depend_on_the_axes_of_the_file(axes, turned):
    grey, _ = fake_volume(0)
    affine = affine_of((0.7, 1.3, 2.9), "RAS", turned=turned)
    straight = view_of(Frame(grey.shape, affine))
    stored, other = restored(grey, affine, axes)
    view = view_of(Frame(stored.shape, other))
    np.testing.assert_array_equal(view.slices(stored), straight.slices(grey))
    np.testing.assert_allclose(view.spacing, (2.9, 1.3, 0.7), rtol=1e-6)  # slices, rows, columns
    np.testing.assert_array_equal(view.stored(view.slices(stored)), stored)


@pytest.mark.parametrize(
    ("plane", "row", "column"), [("axial", "P", "L"), ("coronal", "I", "L"), ("sagittal", "I", "P")]
)
def test_planes_are_shown_as_radiologists_see_them(plane, row, column):
    """Going down the rows leads to the back or down, along the columns to the patient's left or back."""
    world = {"R": 0, "A": 1, "S": 2, "L": 0, "P": 1, "I": 2}
    sign = {**dict.fromkeys("RAS", 1), **dict.fromkeys("LPI", -1)}
    affine = affine_of((1, 1, 1), "ASR")
    voxels = np.indices((5, 6, 7)).reshape(3, -1)
    places = (affine[:3, :3] @ voxels + affine[:3, 3:]).reshape(3, 5, 6, 7)
    view = view_of(Frame((5, 6, 7), affine), plane)
    for step_axis, letter in ((1, row), (2, column)):
        along = np.diff(view.slices(places[world[letter]]), axis=step_axis)
        assert (along == sign[letter]).all()
    opposite = dict(zip("LPI", "RAS", strict=True))
    assert view.edges == (opposite[column], opposite[row])  # what is left and on top comes before the first step
    flipped = np.arange(5 * 6 * 7).reshape(5, 6, 7)
    num = flipped.shape[view.order[0]]
    for index, one in enumerate(view.slices(flipped)):
        theirs = flipped.take(view.stored_index(index, num), axis=view.order[0])
        assert set(one.ravel()) == set(theirs.ravel())


def test_slices_are_cut_across_the_coarsest_spacing_else_axial():
    def plane(spacing):
        return view_of(Frame((4, 5, 6), affine_of(spacing))).order[0]

    assert plane((1, 1, 1)) == 2 and plane((1, 1, 4)) == 2 and plane((3, 1, 1)) == 0 and plane((1, 2, 1)) == 1
    assert plane((1, 2, 2)) == 2
    with pytest.raises(UserError, match="axial"):
        view_of(Frame((4, 5, 6), np.eye(4)), "axle")


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
def test_labels_are_written_into_the_geometry_of_their_volume(tmp_path, axes, suffix):
    grey, label = fake_volume(1)
    stored, affine = restored(grey, affine_of((0.5, 1.5, 3.0), turned=0.2), axes)
    source = save_nifti(tmp_path / f"image{suffix}", stored, affine)
    volume = read_nifti(source)
    labels = restored(label, affine_of((0.5, 1.5, 3.0), turned=0.2), axes)[0]
    write_labels(tmp_path / "out" / f"label{suffix}", labels, volume)
    ours, theirs = nibabel.load(tmp_path / "out" / f"label{suffix}"), nibabel.load(source)
    np.testing.assert_array_equal(np.asarray(ours.dataobj), labels)
    np.testing.assert_array_equal(ours.affine, theirs.affine)
    assert ours.shape == theirs.shape and nibabel.aff2axcodes(ours.affine) == tuple(axes)
    assert ours.header.get_xyzt_units() == theirs.header.get_xyzt_units()
    assert ours.header["sform_code"] == theirs.header["sform_code"] and ours.get_data_dtype() == np.uint8


def test_a_volume_of_four_dimensions_has_channels(tmp_path):
    values = np.stack([fake_volume(k)[0] for k in (0, 1)], axis=-1)
    volume = read_nifti(save_nifti(tmp_path / "a.nii.gz", values))
    np.testing.assert_array_equal(volume.values, np.moveaxis(values, -1, 0))


def test_scaling_and_what_is_not_finite(tmp_path):
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = nibabel.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, tmp_path / "a.nii")
    scaled = nibabel.load(tmp_path / "a.nii").get_fdata()
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii").values[0], scaled)
    floats = values.astype(np.float32)
    floats[0, 0, 0], floats[1, 2, 3] = np.nan, np.inf
    read = read_nifti(save_nifti(tmp_path / "b.nii", floats)).values[0]
    assert read[0, 0, 0] == read[1, 2, 3] == 1 and np.isfinite(read).all()
    with pytest.raises(UserError, match=r"c\.nii.*finite"):
        read_nifti(save_nifti(tmp_path / "c.nii", np.full((2, 2, 2), np.nan, np.float32)))


def broken(folder):
    """Name -> a file that cannot be read."""
    good = save_nifti(folder / "good.nii.gz", fake_volume(0)[0])
    raw = gzip.decompress(good.read_bytes())
    files = {
        "cut.nii.gz": good.read_bytes()[:-900],
        "cut.nii": raw[:-900],
        "header.nii": raw[:200],
        "empty.nii.gz": b"",
        "text.nii.gz": b"no volume at all",
        "flipped.nii.gz": good.read_bytes()[:700] + b"\x00" * 40 + good.read_bytes()[740:],
        "flat.nii": raw[:312] + b"\0" * 16 + raw[328:],  # the third row of the affine
        "huge.nii": raw[:42] + b"\xff\x7f" * 3 + raw[48:],
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    save_nifti(folder / "five.nii", np.zeros((3, 3, 3, 2, 2), np.float32))
    return [*files, "five.nii", "missing.nii"]


def test_what_cannot_be_read_is_named(tmp_path):
    for name in broken(tmp_path):
        with pytest.raises(UserError) as error:
            read_frame(tmp_path / name)
            read_nifti(tmp_path / name)
        assert str(tmp_path / name) in str(error.value), name


def test_labels_must_lie_where_their_image_lies(tmp_path):
    grey, label = fake_volume(0)
    affine = affine_of((1, 1, 2))
    image = save_nifti(tmp_path / "image.nii", grey, affine)
    frame = read_frame(image)
    nearly = affine + np.r_[np.full((3, 4), 1e-4), np.zeros((1, 4))]  # another program's rounding
    np.testing.assert_array_equal(
        read_label_volume(save_nifti(tmp_path / "a.nii", label, nearly), frame, image), label
    )  # fmt: skip
    for name, wrong, where in (("b", label[1:], affine), ("c", label, affine_of((1, 1, 2), "LAS"))):
        path = save_nifti(tmp_path / f"{name}.nii", wrong, where)
        with pytest.raises(UserError) as error:
            read_label_volume(path, frame, image)
        assert str(path) in str(error.value) and str(image) in str(error.value)
    with pytest.raises(UserError, match="whole numbers"):
        read_label_volume(save_nifti(tmp_path / "d.nii", label + np.float32(0.4), affine), frame, image)
    floats = save_nifti(tmp_path / "e.nii", label.astype(np.float64), affine)
    np.testing.assert_array_equal(read_label_volume(floats, frame, image), label)


# Intensities


def test_windows_are_of_modalities_and_percentiles_of_the_volume():
    values = np.linspace(-1000, 1000, 2001, dtype=np.float32)[None, None, None]
    look = Intensity({"CT": [40, 400]}, [1, 99])
    ct = look(values, ["ct, portal phase"])[0, 0, 0]
    assert ct[values[0, 0, 0] <= -160].max() == 0 and ct[values[0, 0, 0] >= 240].min() == 1
    assert ct[1040] == pytest.approx(0.5)
    mr, brighter = look(values, ["MRI"]), look(values * 1e5 + 7e6, ["MRI"])
    np.testing.assert_allclose(mr, brighter, atol=1e-4)  # any scale of a scanner looks alike
    assert mr.min() == 0 and mr.max() == 1 and (mr == 0).sum() == pytest.approx(20, abs=2)
    assert (look(np.ones((1, 2, 2, 2), np.float32), []) == 0).all()
    for wrong in ({"windows": {"CT": [40, 0]}}, {"percentiles": [5, 5]}, {"percentiles": [0, 101]}):
        with pytest.raises(UserError):
            Intensity(**wrong)


# Slices as images


def test_neighbours_become_channels_and_grey_is_repeated():
    volume = Volume(np.arange(4 * 5 * 6, dtype=np.float32).reshape(1, 4, 5, 6), affine_of((1, 1, 3)))
    stack = Cut().stack(volume)
    assert len(stack) == 6
    image = Cut().image(stack, 2)
    assert image.shape == (5, 4, 3) and (image[..., 0] == image[..., 2]).all() and image.dtype == np.float32
    cut = Cut(neighbours=1)
    image = cut.image(stack, 0)
    np.testing.assert_array_equal(image[..., 0], stack.grey[0, 0])  # there is none above the first
    np.testing.assert_array_equal(image[..., 1], stack.grey[0, 0])
    np.testing.assert_array_equal(image[..., 2], stack.grey[0, 1])
    two = Volume(np.repeat(volume.values, 2, axis=0), volume.affine)
    assert Cut(in_channels=2).image(Cut(in_channels=2).stack(two), 1).shape == (5, 4, 2)
    assert Cut(in_channels=1).image(stack, 1).shape == (5, 4, 1)
    with pytest.raises(UserError, match="in_channels=2"):
        Cut().stack(two)


# DICOM


def ct(shape=(9, 7, 5)):
    return np.random.default_rng(0).integers(-500, 500, shape).astype(np.float32) * 2


def test_a_series_has_hounsfield_units_and_the_place_that_nifti_has(tmp_path):
    values = ct()
    folder = save_dicom(tmp_path / "series", values, order=[3, 0, 4, 1, 2])  # names say nothing of the order
    volume = dicom.read_series(folder)
    np.testing.assert_allclose(volume.values[0], values)
    assert volume.modalities == ("CT",) and nibabel.aff2axcodes(volume.affine) == ("L", "P", "S")
    frame = dicom.read_frame(folder)
    assert frame.shape == (9, 7, 5) and frame.spacing == pytest.approx((0.8, 0.9, 2.5))
    # Voxel (0, 0, 0) is at the first slice's position; LPS to RAS turns the signs of x and y.
    np.testing.assert_allclose(volume.affine @ [0, 0, 0, 1], [30, 40, 7, 1])
    np.testing.assert_allclose(volume.affine @ [8, 0, 4, 1], [30 - 8 * 0.8, 40, 7 + 4 * 2.5, 1])
    write_labels(tmp_path / "label.nii.gz", (values > 0).astype(np.uint8), volume)
    saved = nibabel.load(tmp_path / "label.nii.gz")
    np.testing.assert_allclose(saved.affine, volume.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(saved.dataobj), values > 0)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "slice002.dcm").unlink(), "unequal distances"),
        (lambda folder: save_dicom(folder, ct((9, 7, 2))), "2 DICOM series"),  # replaces two of five
        (lambda folder: os.truncate(folder / "slice001.dcm", 700), "slice001"),
        (lambda folder: save_dicom(folder, ct(), NumberOfFrames=4), "4 frames"),
        (lambda folder: save_dicom(folder, ct(), PixelSpacing=None), "PixelSpacing"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "no DICOM files"),
    ],
)  # fmt: skip
def test_a_series_that_is_none_is_refused(tmp_path, spoil, words):
    folder = save_dicom(tmp_path / "series", ct())
    spoil(folder)
    with pytest.raises(UserError, match=words):
        dicom.read_series(folder)


def test_low_values_that_are_white_are_turned_round(tmp_path):
    values = ct()
    folder = save_dicom(tmp_path / "series", values, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_allclose(dicom.read_series(folder).values[0], values.max() + values.min() - values)
