"""Pascal VOC's average precision of 2007."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import box_iou

from dense_heads.structures import Detection

VOC_CONVENTIONS = (
    " voc_map_50 is VOC 2007's: IoU 0.5, the mean of the largest precisions at recalls 0, 0.1, ..., 1; objects marked "
    "difficult are neither misses nor false alarms."
)


class VocPrecision:
    """Average precision of Pascal VOC 2007 at IoU 0.5: eleven points, difficult objects ignored.

    As the development kit's `VOCevaldet` counts: each detection looks at the one object of its class and image that it
    overlaps most; a second detection of an object is a false alarm, one of a difficult object nothing at all.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Start counting."""
        self.images: list[tuple[dict[int, tuple[Any, Any]], dict[int, int]]] = []

    def count(self, prediction: Detection, target: Mapping[str, Any]) -> None:
        """Add one image: boxes, scores, labels; target boxes, labels and `difficult`."""
        hits: dict[int, tuple[Any, Any]] = {}
        for label in torch.unique(prediction["labels"]).tolist():
            own, theirs = prediction["labels"] == label, target["labels"].to(prediction["labels"].device) == label
            hits[label] = _voc_hits(
                prediction["boxes"][own].double().cpu(),
                prediction["scores"][own].cpu(),
                target["boxes"][theirs].double().cpu(),
                target["difficult"][theirs].cpu(),
            )
        easy = target["labels"][~target["difficult"]].cpu()
        self.images.append((hits, {label: int((easy == label).sum()) for label in torch.unique(easy).tolist()}))

    def compute(self) -> list[float]:
        """The average precision of each class; nan where it has no object that counts."""
        images = self.images
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, self.images)
            images = [image for row in itertools.zip_longest(*every) for image in row if image is not None]
        return [self._precision(images, label) for label in range(self.num_classes)]

    def _precision(self, images: list[Any], label: int) -> float:
        num = sum(counts.get(label, 0) for _, counts in images)
        if num == 0:
            return float("nan")
        found = [hits[label] for hits, _ in images if label in hits]
        scores = np.concatenate([scores for scores, _ in found]) if found else np.zeros(0)
        right = np.concatenate([right for _, right in found]) if found else np.zeros(0, bool)
        right = right[np.argsort(-scores, kind="stable")]
        recall, precision = np.cumsum(right) / num, np.cumsum(right) / np.arange(1, len(right) + 1)
        points = [precision[recall >= at].max(initial=0.0) for at in np.linspace(0, 1, 11)]
        return float(np.mean(points))


def _voc_hits(boxes: Tensor, scores: Tensor, objects: Tensor, difficult: Tensor) -> tuple[Any, Any]:
    """Scores and hits of the detections of one class in one image; those that fall on difficult objects left out."""
    order = scores.argsort(descending=True, stable=True)
    overlaps = box_iou(boxes[order], objects)
    taken: set[int] = set()
    kept, right = [], []
    for place, overlap in zip(order.tolist(), overlaps, strict=True):
        best = int(overlap.argmax()) if len(objects) else -1
        if best >= 0 and overlap[best] >= 0.5:
            if difficult[best]:
                continue
            kept.append(float(scores[place]))
            right.append(best not in taken)
            taken.add(best)
        else:
            kept.append(float(scores[place]))
            right.append(False)
    return np.array(kept), np.array(right, dtype=bool)
