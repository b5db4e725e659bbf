"""Pascal VOC: VOCdevkit/VOC2012 with its segmentation lists, and the augmented training set."""

import logging
from pathlib import Path

from dense_heads.data.datasets.base import SPLITS, Sample, Split, missing_data, read_list, require_files

log = logging.getLogger(__name__)

LAYOUT = """
    VOCdevkit/VOC2012/
        JPEGImages/NAME.jpg
        SegmentationClass/NAME.png
        SegmentationClassAug/NAME.png              (augmented training set)
        ImageSets/Segmentation/train.txt  val.txt  aug.txt
"""


class VOCSegmentation:
    """Pascal VOC 2012 segmentation (the devkit's own layout).

    Training is `train.txt` (masks in SegmentationClass) plus `aug.txt` (masks in SegmentationClassAug), the official
    protocol of DINOv2's heads (mmsegmentation's pascal_voc12_aug: 10,582 images). Where only the other customary list
    `trainaug.txt` = train + aug exists, aug is the part of it that is not in train. Without either, `train.txt` alone
    is used and `notices` says that the result is not comparable. Labels of the test split are not public: it is [].

    Args:
        root: the folder VOCdevkit, VOC2012, or the one that holds VOCdevkit.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: no VOC2012 folder, a missing list, or a listed file that does not exist.
    """

    def __init__(self, root: str | Path, hint: str = "") -> None:
        root = Path(root)
        places = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
        found = next((place for place in places if (place / "ImageSets" / "Segmentation").is_dir()), None)
        if found is None:
            raise missing_data(root / "VOC2012" / "ImageSets" / "Segmentation", LAYOUT, hint)
        self.folder = found
        self.hint = hint
        self.notices: list[str] = []
        self.aug_list = self._find_aug_list()
        if self.aug_list is None:
            self.notices.append(
                "not comparable: trained on VOC's train.txt alone; the published numbers use train + aug (aug.txt and "
                "SegmentationClassAug are missing)"
            )
            log.warning(self.notices[-1])

    def available(self) -> list[Split]:
        """The labelled splits that are on disk."""
        return [split for split in SPLITS if split != "test" and self._list(split).is_file()]

    def samples(self, split: Split) -> list[Sample]:
        """The split's samples, in the order of its lists."""
        if split == "test":
            return []
        path = self._list(split)
        if not path.is_file():
            raise missing_data(path, LAYOUT, self.hint)
        names = read_list(path)
        samples = self._pair(names, "SegmentationClass", path)
        if split == "train" and self.aug_list is not None:
            known = set(names)
            extra = read_list(self.aug_list)
            if self.aug_list.stem == "trainaug":
                extra = [name for name in extra if name not in known]
            samples += self._pair(extra, "SegmentationClassAug", self.aug_list)
        return samples

    def _find_aug_list(self) -> Path | None:
        if not (self.folder / "SegmentationClassAug").is_dir():
            return None
        return next((path for path in (self._list("aug"), self._list("trainaug")) if path.is_file()), None)

    def _list(self, name: str) -> Path:
        return self.folder / "ImageSets" / "Segmentation" / f"{name}.txt"

    def _pair(self, names: list[str], masks: str, source: Path) -> list[Sample]:
        samples = [
            Sample(name, self.folder / "JPEGImages" / f"{name}.jpg", self.folder / masks / f"{name}.png")
            for name in names
        ]
        require_files(samples, source)
        return samples
