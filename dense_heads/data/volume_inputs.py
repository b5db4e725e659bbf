"""Volumes for `mode=predict`: NIfTI files, DICOM series, folders of either."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dense_heads.data import dicom
from dense_heads.data.datasets.volumes import VolumeCase
from dense_heads.data.inputs import Named
from dense_heads.data.slices import read_case
from dense_heads.data.volumes import Volume, case_name, is_nifti
from dense_heads.errors import UserError

_CHANNEL = re.compile(r"_\d{4}$")


class Volumes:
    """A NIfTI file, a folder with a DICOM series, or a folder of either.

    With several modalities files are joined by nnU-Net's names, `CASE_0000.nii.gz`, `CASE_0001.nii.gz`.
    """

    kind = "volumes"

    def __init__(self, modalities: Sequence[str]) -> None:
        """`modalities` that the model was trained on, in order; empty where nothing said."""
        self.modalities = tuple(modalities)

    def find(self, source: Path) -> list[Named]:
        """The cases, each with its name below the output folder."""
        if source.is_file() or dicom.is_series(source):
            return [(self._case((source,)), self._name(source))]
        groups: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(source.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
            if not hidden and (is_nifti(path) or (path.is_dir() and dicom.is_series(path))):
                below = path.parent.relative_to(source) / self._name(path)
                groups[below.as_posix()].append(path)
        if not groups:
            raise UserError(f"input={source} holds no volumes (.nii, .nii.gz, or folders with a DICOM series).")
        twice = next((paths for paths in groups.values() if len(paths) > 1 and len(self.modalities) < 2), None)
        if twice:
            raise UserError(f"{twice[0]} and {twice[1]} have one name; expected one file for each volume.")
        return [(self._case(tuple(paths)), name) for name, paths in groups.items()]

    def read(self, item: VolumeCase) -> Volume:
        """All modalities of a case."""
        if len(item.channels) not in (1, max(1, len(self.modalities))):
            raise UserError(
                f"{item.image}: {len(item.channels)} files for the {len(self.modalities)} modalities that the model "
                f"was trained on ({', '.join(self.modalities)}). Expected CASE_0000.nii.gz, CASE_0001.nii.gz, ..."
            )
        return read_case(item)

    def _name(self, path: Path) -> str:
        name = case_name(path)
        return _CHANNEL.sub("", name) if len(self.modalities) > 1 else name

    def _case(self, channels: tuple[Path, ...]) -> VolumeCase:
        return VolumeCase(self._name(channels[0]), channels[0], channels=channels, modalities=self.modalities)
