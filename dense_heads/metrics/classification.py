"""Accuracy of classes of whole images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SCORES = ("top1", "top5", "macc")
CONVENTIONS = (
    "top1: share of images whose most probable class is theirs. top5: share whose class is among the five most "
    "probable (with five classes or fewer always 1). mAcc: mean over classes of the share of the class's images that "
    "are named rightly, over classes that occur."
)


def hits(probabilities: Tensor, class_ids: Tensor) -> Tensor:
    """(B, K) probabilities and (B,) classes -> (K, 3) counts by class: images, right ones, right among five."""
    num_classes = probabilities.shape[1]
    best = probabilities.topk(min(5, num_classes), dim=1).indices
    right = best == class_ids[:, None]
    each = torch.stack((torch.ones_like(class_ids), right[:, 0].long(), right.any(dim=1).long()), dim=1)
    return torch.zeros(num_classes, 3, dtype=torch.long, device=each.device).index_add_(0, class_ids, each)


def scores(counts: Tensor) -> dict[str, float]:
    """The SCORES of (K, 3) counts; nan where there is no image."""
    images, first, five = counts.double().sum(0)
    occurs = counts[:, 0] > 0
    by_class = counts[occurs, 1].double() / counts[occurs, 0]
    return {"top1": float(first / images), "top5": float(five / images), "macc": float(by_class.mean())}


def per_class(counts: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Name and accuracy of each class; None where it does not occur."""
    rows = zip(names, counts.tolist(), strict=True)
    return [
        {"name": name, "acc": right / images if images else None, "images": images} for name, (images, right, _) in rows
    ]
