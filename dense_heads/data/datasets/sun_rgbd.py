"""SUN RGB-D's test images: where heads that were trained on NYU are measured without further training."""

from pathlib import Path

from dense_heads.data.datasets.base import Sample, Split, missing_data, read_pairs, require_files
from dense_heads.errors import UserError

LAYOUT = """
    ROOT/
        SUNRGBD_val_splits.txt                  lines `SUNRGBD/.../image/NAME.jpg SUNRGBD/.../depth/NAME.png`
        SUNRGBD/{kv1,kv2,realsense,xtion}/...
"""
_LIST = "SUNRGBD_val_splits.txt"


class SUNRGBD:
    """SUN RGB-D, the 5,050 test images as a list of pairs; there is nothing to train on.

    Depth is 16-bit PNG with its bits rotated by three: `task.data.depth.encoding=sun_rgbd`. Samples are sorted by file
    name.

    Args:
        root: the folder with the list and SUNRGBD.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: a missing list, a line of another form, a listed file that does not exist, or a training split asked
            for.
    """

    def __init__(self, root: str | Path, hint: str = "") -> None:
        self.root = Path(root)
        self.notices: list[str] = []
        if not (self.root / _LIST).is_file():
            raise missing_data(self.root / _LIST, LAYOUT, hint)

    def available(self) -> list[Split]:
        """The test split alone."""
        return ["test"]

    def samples(self, split: Split) -> list[Sample]:
        """The test samples, sorted by file name; [] for validation, which does not exist."""
        if split == "train":
            raise UserError(
                "SUN RGB-D is measured here, not trained on: it has no training split. Train with task=nyu_depth, then "
                "run mode=evaluate model=RUN task=sun_rgbd."
            )
        if split == "val":
            return []
        path = self.root / _LIST
        samples = [
            Sample(
                Path(pair.image).with_suffix("").as_posix(),
                self.root / pair.image,
                depth=self.root / pair.depth,
                focal=pair.focal,
            )
            for pair in read_pairs(path)
            if pair.depth is not None
        ]
        require_files(samples, path)
        return samples
