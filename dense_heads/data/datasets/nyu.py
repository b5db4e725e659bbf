"""NYU Depth v2 in the layout that the published depth evaluations read."""

from pathlib import Path

from dense_heads.data.datasets.base import Sample, Split, missing_data, read_pairs, require_files

LAYOUT = """
    ROOT/
        nyudepthv2_train_files_with_gt.txt      lines `/SCENE/rgb_X.jpg /SCENE/sync_depth_X.png FOCAL`
        nyudepthv2_test_files_with_gt.txt       lines `TYPE/rgb_X.jpg TYPE/sync_depth_X.png FOCAL`
        sync/SCENE/rgb_X.jpg  sync_depth_X.png
        official_splits/test/TYPE/rgb_X.jpg  sync_depth_X.png
"""
_PLACES: dict[Split, tuple[str, str]] = {
    "train": ("nyudepthv2_train_files_with_gt.txt", "sync"),
    "val": ("nyudepthv2_test_files_with_gt.txt", "official_splits/test"),
}


class NYUDepth:
    """NYU Depth v2: the synchronised training frames and the 654 official test frames (layout of BTS and AdaBins).

    The published protocol keeps the checkpoint that is best on the test frames, so these are `val`; there is no
    further test split. Samples are sorted by file name.

    Args:
        root: the folder with the two lists, sync and official_splits.
        hint: how to get the data, shown when they are missing.

    Raises:
        UserError: a missing folder or list, a line of another form, or a listed file that does not exist.
    """

    def __init__(self, root: str | Path, hint: str = "") -> None:
        self.root = Path(root)
        self.hint = hint
        self.notices: list[str] = []
        if not self.root.is_dir():
            raise missing_data(self.root, LAYOUT, hint)

    def available(self) -> list[Split]:
        """The splits that have their list on disk."""
        return [split for split, (name, _) in _PLACES.items() if (self.root / name).is_file()]

    def samples(self, split: Split) -> list[Sample]:
        """The split's samples, sorted by file name."""
        if split == "test":
            return []
        name, below = _PLACES[split]
        path, folder = self.root / name, self.root / below
        for part in (path, folder):
            if not part.exists():
                raise missing_data(part, LAYOUT, self.hint)
        samples = [
            Sample(
                Path(pair.image).with_suffix("").as_posix(),
                folder / pair.image,
                depth=folder / pair.depth,
                focal=pair.focal,
            )
            for pair in read_pairs(path)
            if pair.depth is not None
        ]
        require_files(samples, path)
        return samples
