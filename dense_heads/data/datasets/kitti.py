"""KITTI with the Eigen split: raw frames, and sparse depth from the depth benchmark."""

import logging
from pathlib import Path

from dense_heads.data.datasets.base import Sample, Split, missing_data, read_pairs, require_files
from dense_heads.errors import UserError

log = logging.getLogger(__name__)

LAYOUT = """
    ROOT/
        kitti_eigen_train.txt  kitti_eigen_test.txt      lines `IMAGE DEPTH FOCAL`
        input/2011_09_26/2011_09_26_drive_0001_sync/image_02/data/NAME.png
        gt_depth/2011_09_26_drive_0001_sync/proj_depth/groundtruth/image_02/NAME.png
"""
# Customary names of the same files: the toolbox's, AdaBins', BTS', and the benchmark's own download.
_LISTS: dict[Split, tuple[str, ...]] = {
    "train": ("kitti_eigen_train.txt", "kitti_eigen_train_files_with_gt.txt", "eigen_train_files_with_gt.txt"),
    "val": ("kitti_eigen_test.txt", "kitti_eigen_test_files_with_gt.txt", "eigen_test_files_with_gt.txt"),
}
_IMAGES = ("input", "raw", "raw_data")
_DEPTHS = ("gt_depth", "gts", "data_depth_annotated")
_BELOW = ("", "train", "val")  # the benchmark's download sorts its drives into train/ and val/


class KITTIEigen:
    """KITTI, Eigen et al.'s split: 23,158 training and 652 measured test frames; depth is 16-bit PNG, metres times 256.

    Of the test list's 697 lines 45 say `None` for the depth: they are left out, as the published evaluation does. The
    checkpoint is chosen on the test frames, so these are `val`; there is no further test split. Samples are sorted by
    file name.

    Args:
        root: the folder with the lists, the images and the depths.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: a missing folder or list, a line of another form, or a listed file that does not exist.
    """

    def __init__(self, root: str | Path, hint: str = "") -> None:
        self.root = Path(root)
        self.hint = hint
        self.notices: list[str] = []
        self.images, self.depths = self._folder(_IMAGES), self._folder(_DEPTHS)

    def available(self) -> list[Split]:
        """The splits that have their list on disk."""
        return [split for split in _LISTS if self._list(split).is_file()]

    def samples(self, split: Split) -> list[Sample]:
        """The split's measured samples, sorted by file name."""
        if split == "test":
            return []
        path = self._list(split)
        if not path.is_file():
            raise missing_data(path, LAYOUT, self.hint)
        pairs = read_pairs(path)
        samples = [
            Sample(
                Path(pair.image).with_suffix("").as_posix(),
                self.images / pair.image,
                depth=self._depth(pair.depth),
                focal=pair.focal,
            )
            for pair in pairs
            if pair.depth is not None
        ]
        if not samples:
            raise UserError(f"{path}: no line names a depth file; expected `IMAGE DEPTH FOCAL`. Get the list again.")
        if len(samples) < len(pairs):
            notice = f"{split}: {len(pairs) - len(samples)} of the {len(pairs)} lines of {path.name} have no depth"
            if notice not in self.notices:
                self.notices.append(notice)
                log.info(notice)
        require_files(samples, path)
        return samples

    def _depth(self, name: str) -> Path:
        places = [self.depths / below / name for below in _BELOW]
        return next((place for place in places if place.is_file()), places[0])

    def _folder(self, names: tuple[str, ...]) -> Path:
        found = next((self.root / name for name in names if (self.root / name).is_dir()), None)
        if found is None:
            raise missing_data(self.root / names[0], LAYOUT, self.hint)
        return found

    def _list(self, split: Split) -> Path:
        places = [self.root / name for name in _LISTS[split]]
        return next((place for place in places if place.is_file()), places[0])
