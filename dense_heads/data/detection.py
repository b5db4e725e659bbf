"""Images and their objects as training and evaluation samples, and as batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dense_heads.data import segmentation
from dense_heads.data.detection_transforms import DetectionEvalTransform, DetectionTrainPipeline
from dense_heads.data.images import open_image, orientation, read_image
from dense_heads.data.objects import DetectionSample, Objects
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch


class DetectionItem(segmentation.SegmentationItem, total=False):
    """One sample; the keys mean what they mean in `Batch`, without its first dimension."""

    boxes: Tensor  # (n, 4) xyxy; training: float32 pixels of `image`; evaluation: float64 pixels of the image on disk
    labels: Tensor  # (n,) int64
    instance_masks: Tensor  # (n, H, W) bool, in training
    iscrowd: Tensor  # (n,) bool; this and the rest in evaluation
    difficult: Tensor  # (n,) bool
    area: Tensor  # (n,) float64
    mask_codes: tuple[str, ...]  # n run-length codes at the size on disk
    coco_id: int


class DetectionDataset(Dataset[DetectionItem]):
    """Samples on disk as tensors.

    With a `DetectionTrainPipeline`, items are asked for by (epoch, index), and every random choice is a function of
    (seed, epoch, index): not of the worker, nor of what was asked for before. With a `DetectionEvalTransform` the index
    alone does, and objects stay at the size on disk; masks are run-length codes then.

    Raises:
        UserError: from `[...]`: a file that cannot be read, or of another size than its annotations say.
    """

    def __init__(
        self,
        samples: Sequence[DetectionSample],
        transform: DetectionTrainPipeline | DetectionEvalTransform,
        with_masks: bool = False,
        seed: int = 0,
    ) -> None:
        self.samples = list(samples)
        self.transform = transform
        self.with_masks = with_masks
        self.seed = seed

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: segmentation.Key) -> DetectionItem:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        sample = self.samples[index]
        image = read_image(sample.image)
        size = (int(image.shape[0]), int(image.shape[1]))
        if sample.objects is not None and sample.objects.size != size:
            raise size_mismatch(sample, size)
        item: DetectionItem = {"image_id": sample.image_id, "path": str(sample.image), "original_size": size}
        try:
            if isinstance(self.transform, DetectionTrainPipeline):
                assert sample.objects is not None, "nothing to learn from"
                self.transform.set_random_seed(stable_seed("augment", self.seed, epoch, index))
                item.update(self.transform.augment(image, sample.objects))  # type: ignore[typeddict-item]
                seen = item["image"]
            else:
                views = self.transform(image)
                seen = views[0]
                if len(views) == 1:
                    item["image"] = seen
                else:
                    item["views"] = views
                if sample.objects is not None:
                    item.update(self._label(sample.objects))
                item["coco_id"] = index if sample.coco_id is None else sample.coco_id
        except UserError as error:
            raise UserError(f"{sample.image}: {error}") from error
        item["size"] = (seen.shape[1], seen.shape[2])
        return item

    def _label(self, objects: Objects) -> DetectionItem:
        if self.with_masks:
            objects = objects.chosen(np.array([outline is not None for outline in objects.outlines], dtype=bool))
        made: DetectionItem = {
            "boxes": torch.from_numpy(objects.boxes),
            "labels": torch.from_numpy(objects.labels),
            "iscrowd": torch.from_numpy(objects.iscrowd),
            "difficult": torch.from_numpy(objects.difficult),
            "area": torch.from_numpy(objects.area),
        }
        if self.with_masks:
            made["mask_codes"] = tuple(str(code) for code in objects.codes())
        return made


def size_mismatch(sample: DetectionSample, size: Sequence[int]) -> UserError:
    """The error for an image of another size than its annotations say, with both."""
    assert sample.objects is not None
    with open_image(sample.image) as image:
        turned = " The image carries an EXIF rotation, which is applied." if orientation(image) >= 5 else ""
    said = sample.objects.size
    return UserError(
        f"{sample.image} is {size[0]} x {size[1]} (H x W) and its annotations are of {said[0]} x {said[1]}; expected "
        f"equal sizes, or boxes would not be where they belong.{turned} Correct the annotations, or replace the image."
    )


def collate_train(items: Sequence[DetectionItem]) -> Batch:
    """Samples of one size -> `Batch`: images stacked, objects in lists."""
    batch = segmentation.collate_train(items)
    _add_lists(batch, items, ("boxes", "labels", "instance_masks"))
    return batch


def collate_eval(items: Sequence[DetectionItem]) -> Batch:
    """Samples of any sizes -> `Batch` with lists."""
    batch = segmentation.collate_eval(items)
    _add_lists(batch, items, ("boxes", "labels", "iscrowd", "difficult", "area", "mask_codes", "coco_id"))
    return batch


def _add_lists(batch: Batch, items: Sequence[Any], keys: Sequence[str]) -> None:
    for key in keys:
        if all(key in item for item in items):
            batch[key] = [item[key] for item in items]  # type: ignore[literal-required]
