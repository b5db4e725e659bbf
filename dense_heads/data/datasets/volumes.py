"""Volumes on disk: the layouts of the Medical Segmentation Decathlon and of nnU-Net as they are, and plain folders."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense_heads.data import dicom
from dense_heads.data.datasets.base import Reader, Sample, Split, missing_data, shorten
from dense_heads.data.datasets.folders import PairedFolders
from dense_heads.data.folds import NNUNET_SPLITS
from dense_heads.data.volumes import NIFTI_SUFFIXES, case_name, is_nifti
from dense_heads.errors import UserError

_LAYOUT = """
    ROOT/dataset.json                       of the Decathlon or of nnU-Net, with imagesTr/ and labelsTr/
or
    ROOT/images/CASE.nii.gz                 or a folder CASE with a DICOM series
    ROOT/labels/CASE.nii.gz
"""


@dataclass(frozen=True)
class VolumeCase(Sample):
    """A case on disk; `image` is its first file (or its folder with a DICOM series), `mask` its label volume."""

    channels: tuple[Path, ...] = ()  # all files, in the order of the modalities; a file of four dimensions stands alone
    modalities: tuple[str, ...] = ()


def open_volumes(
    root: str | Path, hint: str = "", images: str = "images/{split}", masks: str = "labels/{split}"
) -> Reader:
    """The reader of what lies in `root`.

    Args:
        root: the folder of the data set.
        hint: how to get the data, shown when they are missing.
        images: of plain folders (without a `dataset.json`): where they lie, as for PairedFolders.
        masks: the same of labels.

    Raises:
        UserError: there is no such folder, or a `dataset.json` that describes something else.
    """
    root = Path(root)
    if not root.is_dir():
        raise missing_data(root, _LAYOUT, hint)
    if (root / "dataset.json").is_file():
        return DescribedVolumes(root, hint)
    return VolumeFolders(root, images, masks, hint=hint)


class VolumeFolders(PairedFolders):
    """NIfTI files or folders with DICOM series, and label volumes of the same names; splits as PairedFolders."""

    def find_images(self, folder: Path) -> dict[str, Path]:
        """Volumes by id: NIfTI files, and folders that hold a series."""
        found = self.find_masks(folder)
        for path in sorted(folder.iterdir()):
            if dicom.is_series(path):
                if path.name in found:
                    raise UserError(f"{found[path.name]} and {path} have one name; expected one volume for each.")
                found[path.name] = path
        return dict(sorted(found.items()))

    def find_masks(self, folder: Path) -> dict[str, Path]:
        """NIfTI files by id."""
        found: dict[str, Path] = {}
        for path in sorted(folder.iterdir()):
            if not is_nifti(path) or path.name.startswith("."):
                continue
            if case_name(path) in found:
                raise UserError(f"{found[case_name(path)]} and {path} have one name; expected one file for each.")
            found[case_name(path)] = path
        return found

    def samples(self, split: Split) -> list[Sample]:
        """The split's cases, sorted by id."""
        return [VolumeCase(s.image_id, s.image, s.mask, channels=(s.image,)) for s in super().samples(split)]

    def _draw_split(self) -> dict[str, list[str]] | None:
        return None  # folds are drawn, by patient


class DescribedVolumes:
    """A folder with `dataset.json`: Decathlon (lists of files) or nnU-Net (`imagesTr/CASE_0000.nii.gz`, `labelsTr/`).

    Names of the classes and of the modalities are taken from the file. Without a validation list all labelled cases
    are training; `splits_final.json` beside it, or drawn folds, split them.

    Raises:
        UserError: a description that is not readable, or files that it names and that are not there.
    """

    def __init__(self, root: Path, hint: str = "") -> None:
        self.root, self.hint = root, hint
        self.notices: list[str] = []
        self.path = root / "dataset.json"
        try:
            self.content: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            named = self.content.get("channel_names", self.content.get("modality"))
            self.modalities = tuple(str(named[key]) for key in sorted(named, key=int))
            self.class_names, self.ignore = _classes(self.content["labels"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{self.path} does not describe a data set ({type(error).__name__}: {error}). Expected `labels` and "
                "`modality` (Decathlon) or `channel_names` (nnU-Net)."
            ) from error
        ending = str(self.content.get("file_ending", NIFTI_SUFFIXES[0]))
        if ending not in NIFTI_SUFFIXES:
            raise UserError(
                f"{self.path}: file_ending {ending!r}; expected {' or '.join(NIFTI_SUFFIXES)}. Sets of pictures are "
                "read as 2-D tasks: image and mask folders."
            )
        self.cases = {"train": self._training(), "val": self._listed("validation"), "test": self._test()}

    @property
    def splits_file(self) -> Path:
        """Where nnU-Net keeps its folds."""
        return self.root / NNUNET_SPLITS

    def available(self) -> list[Split]:
        """The splits with at least one case."""
        return [split for split in ("train", "val", "test") if self.cases[split]]

    def samples(self, split: Split) -> list[Sample]:
        """The split's cases, sorted by id."""
        return sorted(self.cases[split], key=lambda case: case.image_id)

    def _training(self) -> list[Sample]:
        if isinstance(self.content.get("training"), list):
            return self._listed("training")
        labels = self.root / "labelsTr"
        if not labels.is_dir():
            raise missing_data(labels, _LAYOUT, self.hint)
        masks = {case_name(path): path for path in sorted(labels.iterdir()) if is_nifti(path)}
        return self._joined(self._by_case(self.root / "imagesTr"), masks, "labelsTr")

    def _test(self) -> list[Sample]:
        folder, labels = self.root / "imagesTs", self.root / "labelsTs"
        if not folder.is_dir():
            return []
        masks = (
            {case_name(path): path for path in sorted(labels.iterdir()) if is_nifti(path)} if labels.is_dir() else {}
        )
        files = self._by_case(folder)
        if not masks:
            return [self._case(name, channels, None) for name, channels in files.items()]
        return self._joined(files, masks, "labelsTs")

    def _listed(self, key: str) -> list[Sample]:
        """Cases of one of Decathlon's lists, `{"image": ..., "label": ...}`."""
        found = []
        for entry in self.content.get(key) or []:
            if not (isinstance(entry, Mapping) and isinstance(entry.get("image"), str)):
                raise UserError(
                    f'{self.path}: {key} holds {str(entry)[:80]!r}; expected {{"image": ..., "label": ...}}.'
                )
            image = self._below(entry["image"])
            name = case_name(image)
            channels: tuple[Path, ...] = (image,)
            if not image.is_file():  # nnU-Net's first version lists CASE.nii.gz for CASE_0000.nii.gz, ...
                channels = tuple(sorted(image.parent.glob(f"{name}_[0-9][0-9][0-9][0-9].nii*"))) or channels
            label = self._below(entry["label"]) if isinstance(entry.get("label"), str) else None
            found.append(self._case(name, channels, label))
        missing = [str(p) for case in found for p in (*case.channels, case.mask) if p is not None and not p.is_file()]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of the files it lists under {key} do not exist: {shorten(missing)}. The "
                "data set is incomplete; unpack it again, or correct the list."
            )
        return list(found)

    def _below(self, name: str) -> Path:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{self.path}: {name!r}; expected a path below the data set's folder.")
        return self.root / name

    def _by_case(self, folder: Path) -> dict[str, tuple[Path, ...]]:
        """Case -> its files; nnU-Net numbers the channels, Decathlon has one file."""
        if not folder.is_dir():
            raise missing_data(folder, _LAYOUT, self.hint)
        found: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(folder.iterdir()):
            if is_nifti(path) and not path.name.startswith("."):
                found[re.sub(r"_\d{4}$", "", case_name(path))].append(path)
        return {name: tuple(files) for name, files in found.items()}

    def _joined(self, files: Mapping[str, tuple[Path, ...]], masks: Mapping[str, Path], where: str) -> list[Sample]:
        lonely = sorted(files.keys() ^ masks.keys())
        if lonely or not files:
            raise UserError(
                f"{self.root}: {len(lonely)} cases are in only one of images and {where}: {shorten(lonely)}. Expected "
                "an image and a label of each case. Add or remove files."
            )
        return [self._case(name, files[name], masks[name]) for name in files]

    def _case(self, name: str, channels: tuple[Path, ...], label: Path | None) -> VolumeCase:
        if len(channels) not in (1, len(self.modalities)):
            raise UserError(
                f"{channels[0]}: {len(channels)} files for case {name}, but {self.path.name} names "
                f"{len(self.modalities)} modalities ({', '.join(self.modalities)}). Expected one file for each."
            )
        return VolumeCase(name, channels[0], label, channels=channels, modalities=self.modalities)


def _classes(labels: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names in the order of their numbers, and the numbers that count nowhere.

    Decathlon has number -> name, nnU-Net name -> number, `ignore` among them.
    """
    if not labels:
        raise ValueError("no labels")
    turned = all(str(key).isdigit() for key in labels)
    by_number = {int(k): str(v) for k, v in labels.items()} if turned else {}
    if not turned:
        regions = [name for name, value in labels.items() if isinstance(value, list)]
        if regions:
            raise ValueError(f"regions that overlap ({shorten(regions)}); expected one number for each class")
        by_number = {int(value): str(name) for name, value in labels.items()}
    ignored = tuple(number for number, name in by_number.items() if name == "ignore" and not turned)
    numbers = sorted(by_number.keys() - set(ignored))
    if numbers != list(range(len(numbers))):
        raise ValueError(f"label numbers {numbers}; expected 0, 1, 2, ... without gaps")
    return tuple(by_number[number] for number in numbers), ignored
