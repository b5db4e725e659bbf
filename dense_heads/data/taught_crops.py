"""Crops with what a teacher made of them: a frozen teacher's features are computed once for each view of an image."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from dense_heads.data.feature_store import CachedDataset
from dense_heads.data.unlabelled import CropDataset, collate_crops
from dense_heads.structures import Batch, Levels


class CropViews(Dataset[dict[str, Any]]):
    """What the teacher looks at: asked by (view, index), an image's global crops of that view."""

    def __init__(self, crops: CropDataset) -> None:
        self.crops = crops

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        batch = collate_crops(self.crops.__getitems__([key]))
        return {"views": list(batch["crops"][0])}


class TaughtCrops(Dataset[Batch]):
    """Crops of `num_views` views of each image, cycled through, with the teacher's features of the same crops.

    Asked for a list of (epoch, index), gives a batch with `crops` and `features`, both view by view.
    """

    def __init__(self, crops: CropDataset, features: CachedDataset) -> None:
        self.crops, self.features = crops, features

    def __len__(self) -> int:
        return len(self.crops)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> Batch:
        """What a loader calls for a batch."""
        keys = [(epoch % self.features.num_views, index) for epoch, index in keys]
        batch = collate_crops(self.crops.__getitems__(keys))
        seen = [self.features[key]["views"] for key in keys]
        batch["features"] = Levels.cat([view.windows[0] for views in zip(*seen, strict=True) for view in views])
        return batch
