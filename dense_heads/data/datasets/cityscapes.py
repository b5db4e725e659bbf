"""Cityscapes: leftImg8bit and gtFine, one folder per city."""

from pathlib import Path

from dense_heads.data.datasets.base import SPLITS, Sample, Split, missing_data, require_files
from dense_heads.errors import UserError

LAYOUT = """
    ROOT/
        leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
        gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png
"""
_IMAGE_END = "_leftImg8bit.png"


class Cityscapes:
    """Cityscapes fine annotations (the official layout).

    Masks are the `labelIds` files; which of the 34 ids is which of the 19 classes stands in the task's `labels.map`
    and nowhere else. Labels of the official test split are not public: it is [].

    Args:
        root: the folder with leftImg8bit and gtFine.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: a missing folder, no images in it, or an image without its mask.
    """

    def __init__(self, root: str | Path, hint: str = "") -> None:
        self.root = Path(root)
        self.hint = hint
        self.notices: list[str] = []
        for part in ("leftImg8bit", "gtFine"):
            if not (self.root / part).is_dir():
                raise missing_data(self.root / part, LAYOUT, hint)

    def available(self) -> list[Split]:
        """The labelled splits that are on disk."""
        return [split for split in SPLITS if split != "test" and (self.root / "leftImg8bit" / split).is_dir()]

    def samples(self, split: Split) -> list[Sample]:
        """The split's samples, sorted by city and name."""
        if split == "test":
            return []
        folder = self.root / "leftImg8bit" / split
        if not folder.is_dir():
            raise missing_data(folder, LAYOUT, self.hint)
        samples = []
        for image in sorted(folder.glob(f"*/*{_IMAGE_END}")):
            city, name = image.parent.name, image.name.removesuffix(_IMAGE_END)
            mask = self.root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png"
            samples.append(Sample(f"{city}/{name}", image, mask))
        if not samples:
            raise UserError(f"{folder}: no images; expected CITY/NAME{_IMAGE_END}.\nThe layout is:\n{LAYOUT}")
        require_files(samples, folder)
        return samples
