"""Images with one class each: folders of classes (ImageFolder), or lists of images with their class."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dense_heads.data.datasets.base import SPLIT_NAMES, SPLITS, Split, draw_split, missing_data, read_list, shorten
from dense_heads.data.images import list_images
from dense_heads.errors import UserError, unknown_name

log = logging.getLogger("dense_heads")

_LAYOUT = """
    ROOT/
        train/CLASS/NAME.jpg    or train.txt, one `path/of/image.jpg CLASS` a line
        val/CLASS/NAME.jpg      or val.txt; without it a fifth of the training images is held out
"""


@dataclass(frozen=True)
class ClassSample:
    """One image on disk and the name of its class."""

    image_id: str
    image: Path
    label: str


class ClassFolders:
    """A data set of whole images with one class each.

    Looked for in this order: folders (`train/CLASS/NAME.jpg`, as torchvision's ImageFolder), lists (`train.txt` with
    an image path, relative to the root, and a class a line, parted by a tab or the last blank), folders of classes in
    the root itself. A validation split that is nowhere is a fifth of the training images, drawn by a hash of
    (seed, id); `made_split` then holds it.

    Args:
        root: the folder of the data set.
        splits: the names of the splits' folders and lists, `{"val": "test", ...}`. Default: the usual names are tried.
            A split that the mapping leaves out does not exist.
        val_fraction: the share held out where nothing says how to split.
        seed: of that choice.
        split: ids of each split, as `made_split` gave them before; nothing is drawn then.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: nothing is there, a list of another form or naming files that do not exist.
    """

    def __init__(
        self,
        root: str | Path,
        splits: Mapping[str, str] | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
        split: Mapping[str, Sequence[str]] | None = None,
        hint: str = "",
    ) -> None:
        for name in splits or {}:
            if name not in SPLITS:
                raise unknown_name("split", name, SPLITS)
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction is {val_fraction}; expected a share between 0 and 1, such as 0.2.")
        self.root, self.notices = Path(root).expanduser(), list[str]()
        if not self.root.is_dir():
            raise missing_data(self.root, _LAYOUT, hint)
        names = SPLIT_NAMES if splits is None else {name: (folder,) for name, folder in splits.items()}
        self.found: dict[str, list[ClassSample]] = {}
        for name, places in names.items():
            if samples := self._read(places):
                self.found[name] = samples
        if not self.found:
            if splits is not None or not (samples := _in_folders(self.root, "")):
                raise missing_data(self.root / names["train"][0], _LAYOUT, hint)
            self.found = {"train": samples}
        self.made_split: dict[str, list[str]] | None = None
        if "train" in self.found and "val" not in self.found:
            self._part(val_fraction, seed, split)

    @property
    def categories(self) -> list[str]:
        """The names of the classes, sorted; numbers as numbers."""
        names = {sample.label for sample in self.found.get("train") or next(iter(self.found.values()))}
        return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)

    def available(self) -> list[Split]:
        """The splits that are on disk or were drawn."""
        return [split for split in SPLITS if split in self.found]

    def samples(self, split: Split) -> list[ClassSample]:
        """The split's images, class by class or as listed; [] for a test split that does not exist."""
        if split not in self.found and split != "test":
            raise missing_data(self.root / split, _LAYOUT)
        return self.found.get(split, [])

    def _read(self, places: Sequence[str]) -> list[ClassSample]:
        for place in places:
            if (self.root / place).is_dir() and (samples := _in_folders(self.root / place, f"{place}/")):
                return samples
            if (self.root / f"{place}.txt").is_file():
                return _listed(self.root / f"{place}.txt")
        return []

    def _part(self, val_fraction: float, seed: int, kept: Mapping[str, Sequence[str]] | None) -> None:
        """Hold a part of the training images out."""
        by_id = {sample.image_id: sample for sample in self.found["train"]}
        drawn = draw_split(list(by_id), val_fraction, seed, self.root) if kept is None else kept
        unknown = [i for ids in drawn.values() for i in ids if i not in by_id]
        if unknown:
            raise UserError(
                f"The kept split names {len(unknown)} images that are not in {self.root}: {shorten(unknown)}."
            )
        self.made_split = {name: list(ids) for name, ids in drawn.items()}
        self.found |= {name: [by_id[i] for i in ids] for name, ids in self.made_split.items()}
        if kept is None:
            text = f"no validation split on disk: {len(drawn['val'])} of {len(by_id)} images are held out (seed {seed})"
            self.notices.append(text)
            log.info(text)


def _in_folders(folder: Path, prefix: str) -> list[ClassSample]:
    """`folder/CLASS/.../NAME.jpg`, sorted; [] where there is no such image."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [
        ClassSample(f"{prefix}{path.relative_to(folder).as_posix()}", path, place.name)
        for place in classes
        for path in list_images(place, recursive=True)
    ]


def _listed(path: Path) -> list[ClassSample]:
    samples = []
    for line in read_list(path):
        name, _, label = (part.strip() for part in line.rpartition("\t" if "\t" in line else " "))
        if not name or not label:
            raise UserError(
                f"{path}: the line {line[:200]!r}; expected `path/of/image.jpg CLASS`, parted by a tab or a blank."
            )
        samples.append(ClassSample(name, path.parent / name, label))
    if gone := [str(sample.image) for sample in samples if not sample.image.is_file()]:
        raise UserError(
            f"{path} names {len(gone)} files that do not exist: {shorten(gone)}. Expected paths relative to "
            f"{path.parent}, or absolute ones."
        )
    return samples
