"""Images and masks as training and evaluation samples, and as batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.data.datasets.base import Sample
from dense_heads.data.images import open_image, orientation, read_image
from dense_heads.data.labels import LabelRule
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch, Levels, Size, View

Key = tuple[int, int] | int


class SegmentationItem(TypedDict, total=False):
    """One sample; the keys mean what they mean in `Batch`, without its first dimension."""

    image: Tensor  # (3, H, W)
    views: Sequence[View]  # in place of `image`: with several test scales, or where they are cached features
    features: Levels  # in training, in place of `image`: cached features of one image
    mask: Tensor  # (H, W) int64; in evaluation at the label's own size
    image_id: str
    path: str
    size: Size  # of `image`, or of the first view
    original_size: Size


class SegmentationDataset(Dataset[SegmentationItem]):
    """Samples on disk as tensors.

    With a `TrainPipeline`, items are asked for by (epoch, index), and every random choice is a function of (seed,
    epoch, index): not of the worker, nor of what was asked for before. With an `EvalTransform` the index alone
    does, and the mask stays at its own size.

    Raises:
        UserError: from `[...]`: a file that cannot be read, image and mask of different sizes, a label outside the
            classes; always with the path.
    """

    def __init__(
        self, samples: Sequence[Sample], labels: LabelRule, transform: TrainPipeline | EvalTransform, seed: int = 0
    ) -> None:
        self.samples = list(samples)
        self.labels = labels
        self.transform = transform
        self.seed = seed
        labels.prepare(self.mask_files())

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key) -> SegmentationItem:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = self.samples[index]
        image, mask = self.read(sample)
        item: SegmentationItem = {
            "image_id": sample.image_id,
            "path": str(sample.image),
            "original_size": (int(image.shape[0]), int(image.shape[1])),
        }
        self.describe(sample, item)
        try:
            if isinstance(self.transform, TrainPipeline):
                self.transform.set_random_seed(stable_seed("augment", self.seed, epoch, index))
                item["image"], target = self.transform(image, mask)
            else:
                views = self.transform(image)
                if len(views) == 1:
                    item["image"] = views[0]
                else:
                    item["views"] = views
                target = None if mask is None else torch.from_numpy(mask)
        except UserError as error:
            raise UserError(f"{sample.image}: {error}") from error
        first = item["image"] if "image" in item else views[0]
        item["size"] = (first.shape[1], first.shape[2])
        if target is not None:
            item["mask"] = target
        return item

    def mask_files(self) -> list[Path]:
        """What the decision on how labels are stored is made from."""
        return [sample.mask for sample in self.samples if sample.mask is not None]

    def read(self, sample: Sample) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]:
        """Image (H, W, 3) uint8 and train ids (H, W)."""
        image = read_image(sample.image)
        mask = None if sample.mask is None else self.labels.read(sample.mask)
        if mask is not None and mask.shape != image.shape[:2]:
            raise size_mismatch(sample, image.shape[:2], mask.shape)
        return image, mask

    def describe(self, sample: Sample, item: SegmentationItem) -> None:
        """Add to the item what a family knows of the sample."""


def size_mismatch(sample: Sample, image_size: Sequence[int], mask_size: Sequence[int]) -> UserError:
    """The error for an image and a mask of different sizes, with both."""
    with open_image(sample.image) as image:
        turned = " The image carries an EXIF rotation, which is applied." if orientation(image) >= 5 else ""
    return UserError(
        f"{sample.image} is {image_size[0]} x {image_size[1]} (H x W) and its mask {sample.mask} is {mask_size[0]} x "
        f"{mask_size[1]}; expected equal sizes.{turned} Make the mask anew at the image's size, or remove the pair."
    )


def collate_train(items: Sequence[SegmentationItem]) -> Batch:
    """Samples of one size -> `Batch` with stacked tensors, of cached features or images."""
    batch = _common(items)
    if "features" in items[0]:
        batch["features"] = Levels.cat([item["features"] for item in items])
    else:
        batch["image"] = torch.stack([item["image"] for item in items])
    if "mask" in items[0]:
        batch["mask"] = torch.stack([item["mask"] for item in items])
    return batch


def collate_eval(items: Sequence[SegmentationItem]) -> Batch:
    """Samples of any sizes -> `Batch` with lists: nothing is padded to another image's size."""
    batch = _common(items)
    if "views" in items[0]:
        batch["views"] = [list(item["views"]) for item in items]
    else:
        batch["image"] = [item["image"] for item in items]
    if "mask" in items[0]:
        batch["mask"] = [item["mask"] for item in items]
    return batch


def _common(items: Sequence[Any]) -> Batch:
    return {
        "image_id": [item["image_id"] for item in items],
        "path": [item["path"] for item in items],
        "size": torch.tensor([item["size"] for item in items]),
        "original_size": torch.tensor([item["original_size"] for item in items]),
    }
