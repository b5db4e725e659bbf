"""Paired folders of images and depth maps: everyone's own data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from dense_heads.data.datasets.base import Sample, missing_data, shorten
from dense_heads.data.datasets.folders import PairedFolders, _by_id, _Place
from dense_heads.data.depth_maps import DEPTH_SUFFIXES
from dense_heads.errors import UserError


class DepthFolders(PairedFolders):
    """Images in one folder, depth maps of the same names in another: PNG, `.npy`, EXR or TIFF.

    Pairing and splits are those of PairedFolders: names without suffix, a common ending of the depth names
    (`0007_depth.png`) found and announced; split folders, lists, or a seeded choice.

    Args:
        root: the folder of the data set.
        images, depth: folders below it; `{split}` stands for the split's own folder.
        splits: the names of the splits' folders and lists, `{"train": "training", ...}`.
        depth_suffix: what depth names have after the image's (`_depth`); None finds it.
        unpaired: `refuse` or `skip` images without depth and depths without an image.
        val_fraction, seed, split, hint: as for PairedFolders.

    Raises:
        UserError: missing folders, nothing in them, unpaired files, two files of one name, unknown names in a list.
    """

    def __init__(
        self,
        root: str | Path,
        images: str = "images/{split}",
        depth: str = "depth/{split}",
        splits: Mapping[str, str] | None = None,
        depth_suffix: str | None = None,
        unpaired: Literal["refuse", "skip"] = "refuse",
        val_fraction: float = 0.2,
        seed: int = 0,
        split: Mapping[str, Sequence[str]] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(root, images, depth, splits, depth_suffix, unpaired, val_fraction, seed, split, hint)

    def _pair(self, place: _Place, split: str) -> list[Sample]:
        images = _by_id(place.images)
        if not images:
            raise UserError(f"{place.images}: no images in this folder.\nExpected this layout:\n{self._layout()}")
        if not place.masks.is_dir():
            if split == "test":
                self._notice(f"the test split has no depth ({place.masks} does not exist): it can only be predicted")
                return self._listed([Sample(i, path) for i, path in images.items()], place)
            raise missing_data(place.masks, self._layout(), self.hint)
        found = _depth_by_id(place.masks)
        suffix = self._suffix(images, found)
        depths = {i.removesuffix(suffix): path for i, path in found.items() if i.endswith(suffix)}
        lonely = [str(images[i]) for i in images.keys() - depths.keys()]
        lonely += [str(depths[i]) for i in depths.keys() - images.keys()]
        samples = [Sample(i, path, depth=depths[i]) for i, path in images.items() if i in depths]
        if not samples:
            raise UserError(
                f"No image in {place.images} has a depth map in {place.masks}: {shorten(list(images), 3)} beside "
                f"{shorten(list(found), 3) or 'nothing'}. Expected equal names and one of the suffixes "
                f"{' '.join(sorted(DEPTH_SUFFIXES))}; a common ending of the depth names can be "
                "given as +task.data.format.depth_suffix=ENDING."
            )
        if lonely:
            self._report_unpaired(sorted(lonely), place, suffix)
        return self._listed(samples, place)

    def _report_unpaired(self, lonely: list[str], place: _Place, suffix: str) -> None:
        ending = f" (depth names end in {suffix!r})" if suffix else ""
        found = f"{len(lonely)} files of {place.images} and {place.masks} have no partner{ending}: {shorten(lonely)}"
        if self.unpaired == "refuse":
            raise UserError(
                f"{found}. Expected an image and a depth map of each name. Add or remove files, say the names' ending "
                "with +task.data.format.depth_suffix=ENDING, or leave them out with +task.data.format.unpaired=skip."
            )
        self._notice(f"left out: {found}")


def _depth_by_id(folder: Path) -> dict[str, Path]:
    """Depth files by their path below the folder without suffix, sorted; hidden ones are left out."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        below = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in below.parts)
        if hidden or path.suffix.lower() not in DEPTH_SUFFIXES or not path.is_file():
            continue
        name = below.with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{found[name]} and {path} have one name; expected one file for each. Remove one.")
        found[name] = path
    return dict(sorted(found.items()))
