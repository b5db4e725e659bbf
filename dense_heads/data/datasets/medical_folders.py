"""Folders of medical images: what they have beside images and masks, and masks of several labels."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dense_heads.data.datasets.base import Sample, Split, missing_data, shorten
from dense_heads.data.datasets.folders import PairedFolders, _by_id, _Place
from dense_heads.errors import UserError


@dataclass(frozen=True)
class MedicalSample(Sample):
    """An image with what belongs to it."""

    field_of_view: Path | None = None  # a mask: outside of it nothing counts
    instances: Path | None = None  # 0 background, 1..n objects
    label_masks: tuple[Path | None, ...] = ()  # one for each label, None where the image has nothing of it


class MedicalFolders(PairedFolders):
    r"""Images and masks paired as PairedFolders does, with fields of view and instances; splits are made by patient.

    Args:
        root: the folder of the data set.
        images: as for PairedFolders.
        masks: as for PairedFolders.
        id_pattern: a regular expression with one group, searched in the names of all files, which pair by what it finds
            (`^(\d+)_` for `21_training.tif` and `21_manual1.gif`); None pairs by equal names.
        field_of_view: folder of masks outside of which nothing counts; None: there are none.
        instances: folder of label maps of single objects; None: there are none.
        splits: as for PairedFolders.
        mask_suffix: as for PairedFolders.
        unpaired: as for PairedFolders.
        hint: as for PairedFolders.
    """

    def __init__(
        self,
        root: str | Path,
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        splits: Mapping[str, str] | None = None,
        mask_suffix: str | None = None,
        unpaired: Literal["refuse", "skip"] = "refuse",
        id_pattern: str | None = None,
        field_of_view: str | None = None,
        instances: str | None = None,
        hint: str = "",
    ) -> None:
        self.id_pattern = id_pattern
        self.beside = {"field_of_view": field_of_view, "instances": instances}
        super().__init__(root, images, masks, splits, mask_suffix, unpaired, hint=hint)

    def find_images(self, folder: Path) -> dict[str, Path]:
        """Image files by id."""
        found = _by_id(folder)
        if self.id_pattern is None:
            return found
        by_id: dict[str, Path] = {}
        for name, path in found.items():
            match = re.search(self.id_pattern, name)
            if match is None:
                raise UserError(f"{path}: its name has nothing that id_pattern={self.id_pattern!r} finds.")
            if match[1] in by_id:
                raise UserError(f"{by_id[match[1]]} and {path} have one id, {match[1]}; expected one file for each.")
            by_id[match[1]] = path
        return by_id

    def find_masks(self, folder: Path) -> dict[str, Path]:
        """As images."""
        return self.find_images(folder)

    def samples(self, split: Split) -> list[Sample]:
        """The split's samples, sorted by id."""
        found = super().samples(split)
        more: dict[str, dict[str, Path]] = {}
        for name, template in self.beside.items():
            if template is not None and found:
                folder = self.root / self._folder(template, split)
                if not folder.is_dir():
                    raise missing_data(folder, self._layout(), self.hint)
                files = self.find_images(folder)
                suffix = self._suffix({s.image_id: s.image for s in found}, files)
                more[name] = {i.removesuffix(suffix): path for i, path in files.items()}
                without = [s.image_id for s in found if s.image_id not in more[name]]
                if without:
                    raise UserError(f"{folder}: no file for {len(without)} images: {shorten(without)}. Add them.")
        return [self._medical(s, {name: files[s.image_id] for name, files in more.items()}) for s in found]

    def _medical(self, sample: Sample, more: Mapping[str, Any]) -> MedicalSample:
        if isinstance(sample, MedicalSample):
            return replace(sample, **more)
        return MedicalSample(sample.image_id, sample.image, sample.mask, **more)

    def _draw_split(self) -> dict[str, list[str]] | None:
        return None  # folds are drawn, by patient


class MultilabelFolders(MedicalFolders):
    """Images with one folder of binary masks for each label; masks may overlap, and one that is absent is empty.

    Args:
        root: the folder of the data set.
        labels: name of each label -> what stands for `{label}` in `masks`, in the order of `classes.txt`.
        images: as for PairedFolders.
        masks: folder of one label's masks, with `{label}` in it.
        splits: as for PairedFolders.
        id_pattern: as for MedicalFolders.
        field_of_view: as for MedicalFolders.
        hint: as for PairedFolders.
    """

    def __init__(
        self,
        root: str | Path,
        labels: Mapping[str, str],
        images: str = "images/{split}",
        masks: str = "masks/{label}/{split}",
        splits: Mapping[str, str] | None = None,
        id_pattern: str | None = None,
        field_of_view: str | None = None,
        hint: str = "",
    ) -> None:
        if "{label}" not in masks or not labels:
            raise UserError(
                f"masks={masks!r} with {len(labels)} labels; expected {{label}} in it and at least one label."
            )
        self.labels = dict(labels)
        super().__init__(root, images, masks, splits, None, "refuse", id_pattern, field_of_view, None, hint)

    def _pair(self, place: _Place, split: str) -> list[Sample]:
        images = self.find_images(place.images)
        if not images:
            raise UserError(f"{place.images}: no images in this folder.\nExpected this layout:\n{self._layout()}")
        found: dict[str, dict[str, Path]] = {}
        for label, part in self.labels.items():
            folder = Path(str(place.masks).replace("{label}", part))
            files = self.find_masks(folder) if folder.is_dir() else {}
            suffix = self._suffix(images, files)
            found[label] = {i.removesuffix(suffix): path for i, path in files.items()}
            lonely = sorted(found[label].keys() - images.keys())
            if lonely:
                raise UserError(
                    f"{folder}: {len(lonely)} masks without an image: {shorten(lonely)}. Add or remove files."
                )
        masks = {i: tuple(found[label].get(i) for label in self.labels) for i in images}
        if not any(path for paths in masks.values() for path in paths):
            raise missing_data(
                Path(str(place.masks).replace("{label}", next(iter(self.labels.values())))), self._layout()
            )
        samples: list[Sample] = [MedicalSample(i, path, label_masks=masks[i]) for i, path in images.items()]
        return self._listed(samples, place)
