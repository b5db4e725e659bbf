"""Medical images as samples and batches: what they add to segmentation's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dense_heads.data import segmentation
from dense_heads.data.datasets.base import Sample
from dense_heads.data.datasets.medical_folders import MedicalSample
from dense_heads.data.field_of_view import bright_field
from dense_heads.data.images import UInt8, open_image, read_image, upright
from dense_heads.data.labels import LabelRule
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.errors import UserError
from dense_heads.structures import IGNORE_INDEX, Batch

Array = npt.NDArray[Any]
BORDER = 2  # the class of borders, where objects are told apart by them: 0 background, 1 inside, 2 border


class CaseItem(TypedDict, total=False):
    """What a medical sample adds to SegmentationItem: its place in a case, the unit that is measured."""

    case_id: str
    slice_index: int
    num_slices: int  # of the case; 1 for an image
    spacing: tuple[float, float, float]  # mm (pixels, where nothing says) between slices, rows, columns


class MedicalItem(segmentation.SegmentationItem, CaseItem, total=False):
    """One sample; the keys mean what they mean in `Batch`."""

    multilabel: Tensor  # (K, H, W) int64 of 0, 1 and 255, in place of `mask` where labels overlap
    instances: Tensor  # (H, W) int32, 0 background, 1..n; in evaluation


class ImageDataset(segmentation.SegmentationDataset):
    """Medical images; each is a case of one slice.

    Args:
        samples: on disk.
        labels: how masks are read; with several labels each mask, as two classes.
        transform: of training or of evaluation.
        seed: of training.
        pixel_mm: side of a pixel in millimetres; None: distances are in pixels.
        border_px: of samples with instances: train on background, inside and a border of so many pixels (0: none).
        field_of_view: brightness above which the camera saw something; None: the whole image, or the samples' masks.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: LabelRule,
        transform: TrainPipeline | EvalTransform,
        seed: int = 0,
        pixel_mm: float | None = None,
        border_px: int = 0,
        field_of_view: int | None = None,
    ) -> None:
        self.side = 1.0 if pixel_mm is None else float(pixel_mm)
        self.border_px, self.field_of_view = border_px, field_of_view
        super().__init__(samples, labels, transform, seed)

    def mask_files(self) -> list[Path]:
        """Masks of all labels."""
        several = [path for s in self.samples if isinstance(s, MedicalSample) for path in s.label_masks if path]
        return several or super().mask_files()

    def read(self, sample: Sample) -> tuple[Array, Array | None]:
        """Image (H, W, 3), and train ids (H, W) or several labels (H, W, K)."""
        assert isinstance(sample, MedicalSample)
        if sample.label_masks:
            image = read_image(sample.image)
            mask: Array | None = self._read_several(sample, image.shape[:2])
        else:
            image, mask = super().read(sample)
            if mask is not None and self.border_px and isinstance(self.transform, TrainPipeline):
                assert sample.instances is not None, "border_px without instances"
                mask = np.where(mask == IGNORE_INDEX, mask, with_borders(read_instances(sample), self.border_px))
        if mask is not None:
            mask[~self._field(sample, image)] = IGNORE_INDEX
        return image, mask

    def describe(self, sample: Sample, item: Any) -> None:
        """Add the case, and in evaluation the instances."""
        assert isinstance(sample, MedicalSample)
        item |= {"case_id": sample.image_id, "slice_index": 0, "num_slices": 1, "spacing": (1.0, self.side, self.side)}
        if sample.instances is not None and isinstance(self.transform, EvalTransform):
            item["instances"] = torch.from_numpy(read_instances(sample).astype(np.int32))

    def picture(self, index: int) -> UInt8:
        """An image as it is on disk, (H, W, 3)."""
        return read_image(self.samples[index].image)

    def shown(self) -> list[set[int]]:
        """For each image the classes of its label but the background; of several labels those that it has."""
        masks = (self.read(sample)[1] for sample in self.samples)
        return [set() if mask is None else classes_of(mask) for mask in masks]

    def __getitem__(self, key: segmentation.Key) -> Any:
        item: Any = super().__getitem__(key)
        if "mask" in item and item["mask"].ndim == 3:  # (H, W, K), as augmentation wants it
            item["multilabel"] = item.pop("mask").permute(2, 0, 1).contiguous()
        return item

    def _read_several(self, sample: MedicalSample, size: tuple[int, ...]) -> Array:
        masks = []
        for path in sample.label_masks:
            mask = np.zeros(size, dtype=np.int64) if path is None else self.labels.read(path)
            if mask.shape != size:
                raise segmentation.size_mismatch(Sample(sample.image_id, sample.image, path), size, mask.shape)
            masks.append(mask)
        return np.stack(masks, axis=-1)

    def _field(self, sample: MedicalSample, image: Array) -> npt.NDArray[np.bool_]:
        if sample.field_of_view is not None:
            field = read_image(sample.field_of_view)[..., 0] > 127
            if field.shape != image.shape[:2]:
                raise segmentation.size_mismatch(
                    Sample(sample.image_id, sample.image, sample.field_of_view), image.shape[:2], field.shape
                )
            return field
        if self.field_of_view is not None:
            return bright_field(image, self.field_of_view)
        return np.ones(image.shape[:2], dtype=bool)


def classes_of(mask: Array) -> set[int]:
    """The classes of a label (H, W) but the background, or which of several labels (H, W, K) there are."""
    if mask.ndim == 3:
        return set(np.flatnonzero((mask == 1).any(axis=(0, 1))).tolist())
    return set(np.unique(mask).tolist()) - {0, IGNORE_INDEX}


def read_instances(sample: MedicalSample) -> Array:
    """The objects (H, W): 0 background, 1..n.

    Raises:
        UserError: unreadable, in colour, or of another size than the mask.
    """
    assert sample.instances is not None
    with open_image(sample.instances) as opened:
        objects = np.asarray(upright(opened))
    if objects.ndim != 2 or not np.issubdtype(objects.dtype, np.integer):
        raise UserError(
            f"{sample.instances}: {objects.dtype} of shape {objects.shape}; expected one channel with the number of "
            "the object in each pixel, 0 for background (16-bit PNG)."
        )
    return objects


def with_borders(instances: Array, width: int) -> npt.NDArray[np.int64]:
    """Objects (H, W) as 0 background, 1 inside, 2 border: pixels within `width` of background or another object."""
    from scipy import ndimage

    other = np.zeros(instances.shape, dtype=bool)  # has a neighbour that is not of the same object
    for axis in (0, 1):
        change = np.diff(instances, axis=axis) != 0
        before = (slice(None, -1), slice(1, None))
        for side in before:
            at = [slice(None), slice(None)]
            at[axis] = side
            other[tuple(at)] |= change
    near = ndimage.binary_dilation(other, iterations=width - 1) if width > 1 else other
    classes: npt.NDArray[np.int64] = np.where(instances > 0, np.where(near, BORDER, 1), 0)
    return classes


def collate_train(items: Sequence[MedicalItem]) -> Batch:
    """Samples of one size -> `Batch` with stacked tensors."""
    batch = _with_cases(segmentation.collate_train(items), items)
    if "multilabel" in items[0]:
        batch["multilabel"] = torch.stack([item["multilabel"] for item in items])
    return batch


def collate_eval(items: Sequence[MedicalItem]) -> Batch:
    """Samples of any sizes -> `Batch` with lists."""
    batch = _with_cases(segmentation.collate_eval(items), items)
    if "multilabel" in items[0]:
        batch["multilabel"] = [item["multilabel"] for item in items]
    if "instances" in items[0]:
        batch["instances"] = [item["instances"] for item in items]
    return batch


def _with_cases(batch: Batch, items: Sequence[MedicalItem]) -> Batch:
    batch["case_id"] = [item["case_id"] for item in items]
    batch["slice_index"] = [item["slice_index"] for item in items]
    batch["num_slices"] = [item["num_slices"] for item in items]
    batch["spacing"] = torch.tensor([item["spacing"] for item in items], dtype=torch.float64)
    return batch
