"""Makers of small fake volumes: NIfTI in the Decathlon's and nnU-Net's layouts, DICOM series."""

import json

import numpy as np


def affine_of(spacing=(1.0, 1.0, 1.0), axes="RAS", origin=(-20.0, 10.0, 5.0), turned=0.0):
    """Voxel -> mm for stored axes that point where `axes` says, turned by so many radians about z (oblique)."""
    directions = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    turn = np.array([[np.cos(turned), -np.sin(turned), 0], [np.sin(turned), np.cos(turned), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.array([directions[axis] for axis in axes]).T * spacing
    affine[:3, 3] = origin
    return affine


def fake_volume(seed, shape=(14, 16, 12), num_classes=3):
    """Grey values and labels (X, Y, Z): boxes that are brighter the higher their class; every class occurs."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for number in range(1, num_classes):
        start = [int(rng.integers(1, side // 2 - 1)) for side in shape]
        box = tuple(slice(s, s + side // 3 + 1) for s, side in zip(start, shape, strict=True))
        label[box] = number
    label[1 : num_classes + 1, 1, 1] = np.arange(num_classes)
    grey = 100 * label + rng.normal(0, 6, shape) + 50
    return grey.astype(np.float32) * float(10 ** rng.integers(0, 4)), label


def save_nifti(path, array, affine=None):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine_of() if affine is None else affine), path)
    return path


def make_decathlon(root, train=4, val=2, num_classes=3, affine=None, **options):
    """imagesTr, labelsTr and dataset.json with a list of training (and validation) cases."""
    listed = {"training": [], "validation": []}
    for key, first, num in (("training", 0, train), ("validation", 100, val)):
        for i in range(first, first + num):
            grey, label = fake_volume(i, num_classes=num_classes, **options)
            name = f"case_{i:03d}.nii.gz"
            save_nifti(root / "imagesTr" / name, grey, affine)
            save_nifti(root / "labelsTr" / name, label, affine)
            listed[key].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {
        "name": "fake", "modality": {"0": "MRI"}, "labels": {str(k): f"class{k}" for k in range(num_classes)},
        "numTraining": train, "numTest": 0, "training": listed["training"],
    }  # fmt: skip
    if val:
        content["validation"] = listed["validation"]
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def make_nnunet(root, train=5, test=1, channels=("CT", "PET"), num_classes=3):
    """imagesTr/CASE_0000.nii.gz, ..., labelsTr/CASE.nii.gz, imagesTs, and nnU-Net's second dataset.json."""
    for folder, first, num in (("Tr", 0, train), ("Ts", 100, test)):
        for i in range(first, first + num):
            grey, label = fake_volume(i, num_classes=num_classes)
            for channel in range(len(channels)):
                values = grey if channel == 0 else grey.max() - grey
                save_nifti(root / f"images{folder}" / f"pat_{i:03d}_{channel:04d}.nii.gz", values)
            if folder == "Tr":
                save_nifti(root / "labelsTr" / f"pat_{i:03d}.nii.gz", label)
    content = {
        "channel_names": {str(k): name for k, name in enumerate(channels)},
        "labels": {"background": 0, **{f"class{k}": k for k in range(1, num_classes)}},
        "numTraining": train, "file_ending": ".nii.gz",
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def save_dicom(folder, values, spacing=(0.8, 0.9, 2.5), order=None, slope=2.0, intercept=-1000.0, **changes):
    """A CT series of the volume (X, Y, Z) in scanner units, one file for each slice, named in the given order.

    x runs to the patient's left and y to the back, as scanners have it; `changes` sets tags of every slice.
    """
    import pydicom
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid()
    for name, z in enumerate(order if order is not None else range(values.shape[2])):
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset = pydicom.dataset.FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.SeriesInstanceUID, dataset.Modality, dataset.PatientID = series, "CT", "fake"
        dataset.Rows, dataset.Columns = values.shape[1], values.shape[0]
        dataset.PixelSpacing = [spacing[1], spacing[0]]  # between rows, between columns
        dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        dataset.ImagePositionPatient = [-30.0, -40.0, 7.0 + z * spacing[2]]
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
        stored = np.round((values[:, :, z].T - intercept) / slope).astype(np.uint16)
        dataset.PixelData = np.ascontiguousarray(stored).tobytes()
        for key, value in changes.items():
            setattr(dataset, key, value)
        dataset.save_as(folder / f"slice{name:03d}.dcm", enforce_file_format=True)
    return folder
