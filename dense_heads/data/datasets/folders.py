"""Paired folders of images and masks: ADE20K, CamVid, nuclei and everyone's own data."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dense_heads.data.datasets.base import (
    SPLIT_NAMES,
    SPLITS,
    Sample,
    Split,
    draw_split,
    missing_data,
    read_list,
    shorten,
)
from dense_heads.data.images import list_images
from dense_heads.errors import UserError, unknown_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
    """Where the files of a split are, and which of them belong to it (None: all)."""

    images: Path
    masks: Path
    listed: Path | None = None  # train.txt, val.txt, ...


class PairedFolders:
    """Images in one folder, masks of the same names in another.

    Files pair by their path below the two folders, without the suffix; where masks carry one more ending
    (`cell7_mask.png` beside `cell7.jpg`) it is found and announced, unless `mask_suffix` says it. How the data are
    split is looked for in this order: folders (`images/train` or `train/images`), lists (`train.txt`, `val.txt` in the
    root, over `images/` and `masks/`), nothing. A validation split that is nowhere is 20 % of the training images,
    drawn by a hash of (seed, id), so that new images do not reshuffle old ones; `made_split` then holds it, to be kept
    with the run and given back as `split` by whoever resumes.

    Args:
        root: the folder of the data set.
        images, masks: folders below it; `{split}` stands for the split's own folder.
        splits: the names of the splits' folders and lists, `{"train": "training", ...}`. Default: the usual names are
            tried. A split that the mapping leaves out does not exist.
        mask_suffix: what mask names have after the image's (`_mask`); None finds it.
        unpaired: `refuse` or `skip` images without a mask and masks without an image.
        val_fraction: the share held out where nothing says how to split.
        seed: of that choice.
        split: ids of each split, as `made_split` gave them before; nothing is drawn then.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: missing folders, nothing in them, unpaired files, two files of one name, unknown names in a list.
    """

    def __init__(
        self,
        root: str | Path,
        images: str = "images/{split}",
        masks: str = "masks/{split}",
        splits: Mapping[str, str] | None = None,
        mask_suffix: str | None = None,
        unpaired: Literal["refuse", "skip"] = "refuse",
        val_fraction: float = 0.2,
        seed: int = 0,
        split: Mapping[str, Sequence[str]] | None = None,
        hint: str = "",
    ) -> None:
        if unpaired not in ("refuse", "skip"):
            raise unknown_name("value of unpaired", unpaired, ["refuse", "skip"])
        if not 0 < val_fraction < 1:
            raise UserError(f"val_fraction is {val_fraction}; expected a share between 0 and 1, such as 0.2.")
        for name in splits or {}:
            if name not in SPLITS:
                raise unknown_name("split", name, SPLITS)
        for template in (images, masks):
            if Path(template).is_absolute():
                raise UserError(f"{template} is an absolute path; expected a folder below data.root, such as images.")
        self.root = Path(root)
        self.images, self.masks = images, masks
        self.names = SPLIT_NAMES if splits is None else {name: (folder,) for name, folder in splits.items()}
        self.mask_suffix, self.unpaired = mask_suffix, unpaired
        self.val_fraction, self.seed, self.hint = val_fraction, seed, hint
        self.notices: list[str] = []
        if not self.root.is_dir():
            raise missing_data(self.root, self._layout(), hint)
        self.places = self._find_places()
        if not self.places:
            raise missing_data(self.root / self._folder(images, "train"), self._layout(), hint)
        self.made_split: dict[str, list[str]] | None = None
        if split is not None and "train" in self.places:
            self.made_split = {name: list(ids) for name, ids in split.items()}
        elif "train" in self.places and "val" not in self.places and (splits is None or "val" not in splits):
            self.made_split = self._draw_split()

    def available(self) -> list[Split]:
        """The splits that are on disk or were drawn."""
        return [split for split in SPLITS if split in {*self.places, *(self.made_split or ())}]

    def samples(self, split: Split) -> list[Sample]:
        """The split's samples, sorted by id; [] for a test split that does not exist."""
        if self.made_split is not None and split in self.made_split:
            return self._chosen(self._pair(self.places["train"], split), self.made_split[split], "the kept split")
        if split not in self.places:
            if split == "test":
                return []
            raise missing_data(self.root / self._folder(self.images, split), self._layout(), self.hint)
        return self._pair(self.places[split], split)

    def _find_places(self) -> dict[str, _Place]:
        """The first arrangement of which at least one split is there."""
        plain = _Place(self.root / self._folder(self.images, ""), self.root / self._folder(self.masks, ""))
        for swap in (False, True):  # images/train, then train/images
            images, masks = (_swapped(t) if swap else t for t in (self.images, self.masks))
            if "{split}" in images:
                places = {
                    split: _Place(
                        self.root / images.replace("{split}", name), self.root / masks.replace("{split}", name)
                    )
                    for split, names in self.names.items()
                    for name in reversed(names)  # the first name wins
                    if (self.root / images.replace("{split}", name)).is_dir()
                }
                if places:
                    return places
        if not plain.images.is_dir():
            return {}
        lists = {
            split: _Place(plain.images, plain.masks, self.root / f"{name}.txt")
            for split, names in self.names.items()
            for name in reversed(names)
            if (self.root / f"{name}.txt").is_file()
        }
        return lists or {"train": plain}

    def find_images(self, folder: Path) -> dict[str, Path]:
        """Images of a folder by id."""
        return _by_id(folder)

    def find_masks(self, folder: Path) -> dict[str, Path]:
        """Masks of a folder by id, before a common ending is taken off."""
        return _by_id(folder)

    def _pair(self, place: _Place, split: str) -> list[Sample]:
        images = self.find_images(place.images)
        if not images:
            raise UserError(f"{place.images}: no images in this folder.\nExpected this layout:\n{self._layout()}")
        if not place.masks.is_dir():
            if split == "test":
                self._notice(f"the test split has no masks ({place.masks} does not exist): it can only be predicted")
                return self._listed([Sample(i, path) for i, path in images.items()], place)
            raise missing_data(place.masks, self._layout(), self.hint)
        masks = self.find_masks(place.masks)
        suffix = self._suffix(images, masks)
        masks = {i.removesuffix(suffix): path for i, path in masks.items() if i.endswith(suffix)}
        lonely = [str(images[i]) for i in images.keys() - masks.keys()]
        lonely += [str(masks[i]) for i in masks.keys() - images.keys()]
        if lonely:
            self._report_unpaired(sorted(lonely), place, suffix)
        samples = [Sample(i, path, masks[i]) for i, path in images.items() if i in masks]
        if not samples:
            raise UserError(
                f"No image in {place.images} has a mask in {place.masks}: {shorten(list(images), 3)} beside "
                f"{shorten(list(self.find_masks(place.masks)), 3)}. Expected equal names; a common ending of the mask "
                "names can be given as +task.data.format.mask_suffix=ENDING."
            )
        return self._listed(samples, place)

    def _suffix(self, images: Mapping[str, Path], masks: Mapping[str, Path]) -> str:
        """What mask names have after the image's name; found where not one pair has equal names."""
        if self.mask_suffix is not None:
            return self.mask_suffix
        if images.keys() & masks.keys():
            return ""
        endings = Counter(m[n:] for m in masks for n in range(1, len(m)) if m[:n] in images and not m[n].isdigit())
        if not endings:
            return ""
        ending, count = max(endings.items(), key=lambda item: (item[1], -len(item[0])))
        self._notice(f"mask names end in {ending!r} after the image's name ({count} of {len(images)} images)")
        return ending

    def _report_unpaired(self, lonely: list[str], place: _Place, suffix: str) -> None:
        ending = f" (mask names end in {suffix!r})" if suffix else ""
        found = f"{len(lonely)} files of {place.images} and {place.masks} have no partner{ending}: {shorten(lonely)}"
        if self.unpaired == "refuse":
            raise UserError(
                f"{found}. Expected an image and a mask of each name. Add or remove files, say the names' ending with "
                "+task.data.format.mask_suffix=ENDING, or leave them out with +task.data.format.unpaired=skip."
            )
        self._notice(f"left out: {found}")

    def _listed(self, samples: list[Sample], place: _Place) -> list[Sample]:
        if place.listed is None:
            return samples
        # A line may be an id, a file name, or a path that starts at the root.
        start = place.images.relative_to(self.root).as_posix() + "/"
        known = {sample.image_id for sample in samples}
        ids = []
        for line in read_list(place.listed):
            name = line.removeprefix("./").removeprefix(start)
            ids.append(name if name in known else name[: name.rfind(".")] if "." in name else name)
        return self._chosen(samples, ids, str(place.listed))

    def _chosen(self, samples: list[Sample], ids: Sequence[str], source: str) -> list[Sample]:
        by_id = {sample.image_id: sample for sample in samples}
        unknown = [i for i in ids if i not in by_id]
        if unknown:
            raise UserError(
                f"{source} names {len(unknown)} samples that are not in {self.root}: {shorten(unknown)}. "
                "Expected names of images, with or without suffix. Correct the list or add the files."
            )
        return [by_id[i] for i in sorted(set(ids))]

    def _draw_split(self) -> dict[str, list[str]] | None:
        ids = [sample.image_id for sample in self._pair(self.places["train"], "train")]
        drawn = draw_split(ids, self.val_fraction, self.seed, self.root)
        num_val = len(drawn["val"])
        self._notice(f"no validation split on disk: {num_val} of {len(ids)} images are held out (seed {self.seed})")
        return drawn

    def _notice(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)
            log.info(text)

    def _folder(self, template: str, split: str) -> str:
        name = next(iter(self.names.get(split, ())), split)
        return template.replace("{split}", name).strip("/")

    def _layout(self) -> str:
        lines = [
            f"        {self._folder(template, split)}/NAME.{kind}"
            for split in ("train", "val")
            for template, kind in ((self.images, "jpg"), (self.masks, "png"))
        ]
        return "    ROOT/\n" + "\n".join(lines)


def _swapped(template: str) -> str:
    """`images/{split}` -> `{split}/images`."""
    return "/".join(reversed(template.split("/")))


def _by_id(folder: Path) -> dict[str, Path]:
    """Image files by their path below the folder without suffix, sorted."""
    found: dict[str, Path] = {}
    for path in list_images(folder, recursive=True):
        image_id = path.relative_to(folder).with_suffix("").as_posix()
        if image_id in found:
            raise UserError(f"{found[image_id]} and {path} have one name; expected one file for each. Remove one.")
        found[image_id] = path
    return dict(sorted(found.items()))
