"""One pass of a frozen backbone over a data set, as records that the feature cache keeps.

What is kept of an image is every level that some head asks for: in training of the whole augmented image, in evaluation
of each window (and mirrored window) that the inference would look at.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dense_heads.data.datamodule import one_thread
from dense_heads.data.records import Record, encode
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference, crop, view_size
from dense_heads.structures import FeatureRequest, Levels, SeenView

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FeaturePass:
    """What is to be computed, and how.

    Args:
        what: how messages call it, such as `camvid, train`.
        dataset: gives items with `image` (C, H, W), or with `views`, a list of such.
        keys: what the data set is asked for, record by record.
        frozen: the backbone.
        requests: of the heads that will read the features.
        inference: how evaluation looks at an image; None in training, which sees it whole.
        dtype: the features are kept in.
        batch: images or windows in one pass of the backbone.
        num_workers: processes that load images.
        pooled: keep each map's mean only.
    """

    what: str
    dataset: Dataset[Any]
    keys: Sequence[Any]
    frozen: FrozenBackbone
    requests: Sequence[FeatureRequest]
    inference: Inference | None
    dtype: torch.dtype
    batch: int = 8
    num_workers: int = 0
    pooled: bool = False

    def records(self, numbers: Iterable[Sequence[int]]) -> Iterator[list[Record]]:
        """For each list of record numbers its records, in order; loading goes on while the backbone computes."""
        loader: DataLoader[list[Any]] = DataLoader(
            _Keyed(self.dataset, self.keys),
            batch_sampler=numbers,  # type: ignore[arg-type]
            collate_fn=list,
            num_workers=self.num_workers,
            prefetch_factor=1 if self.num_workers else None,
            worker_init_fn=one_thread,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        for items in loader:
            views = self._see([item["views"] if "views" in item else [item["image"]] for item in items])
            yield [
                encode(item, seen, self.inference is None, self.dtype) for item, seen in zip(items, views, strict=True)
            ]

    def _see(self, views: Sequence[Sequence[Tensor]]) -> list[list[SeenView]]:
        """Each item's views as features; windows of equal size share passes."""
        crops = [[self._windows(view) for view in of_item] for of_item in views]
        groups: dict[torch.Size, list[tuple[int, int, int]]] = defaultdict(list)
        for item, of_item in enumerate(crops):
            for view, windows in enumerate(of_item):
                for window, pixels in enumerate(windows):
                    groups[pixels.shape].append((item, view, window))
        seen: dict[tuple[int, int, int], Levels] = {}
        for places in groups.values():
            for start in range(0, len(places), self.batch):
                part = places[start : start + self.batch]
                levels = self._pass(torch.stack([crops[item][view][window] for item, view, window in part]))
                seen |= {place: _one(levels, index) for index, place in enumerate(part)}
        return [
            [
                SeenView(view_size(pixels), [seen[item, view, window] for window in range(len(crops[item][view]))])
                for view, pixels in enumerate(of_item)
            ]
            for item, of_item in enumerate(views)
        ]

    def _windows(self, view: Tensor) -> list[Tensor]:
        if self.inference is None:
            return [view]
        return [crop(view, box, flip) for box, flip in self.inference.windows(view_size(view))]

    @torch.inference_mode()
    def _pass(self, images: Tensor) -> Levels:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        levels: Levels = self.frozen.to(device)(images.to(device), self.requests)
        return (levels.pooled() if self.pooled else levels).to("cpu")


class _Keyed(Dataset[Any]):
    """A data set asked by record number, for its image's features."""

    def __init__(self, dataset: Dataset[Mapping[str, Any]], keys: Sequence[Any]) -> None:
        self.dataset, self.keys = dataset, keys

    def __getitem__(self, number: int) -> Any:
        return self.dataset[self.keys[number]]


def _one(levels: Levels, index: int) -> Levels:
    return levels.map(lambda tensor: tensor[index : index + 1])
