"""Training images without labels among those that have some: for a teacher that labels them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from dense_heads.data.datasets.base import Sample


class WithUnlabelled(Dataset[Any]):
    """The samples of a training set, then images without labels, prepared alike.

    Args:
        labelled: a data set whose items hold `label` (H, W); asked by (epoch, index).
        images: files without labels.
        label: `mask` or `depth_m`.
        nowhere: the value of a pixel that counts nowhere; images without labels hold it everywhere.
    """

    def __init__(self, labelled: Any, images: Sequence[Path], label: str, nowhere: int | float) -> None:
        self.whole = copy.copy(labelled)
        self.whole.samples = [*labelled.samples, *(Sample(path.stem, path) for path in images)]
        self.label, self.nowhere = label, nowhere

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        item = self.whole[key]
        if self.label not in item:
            item[self.label] = torch.full(item["image"].shape[-2:], self.nowhere)
        return item
