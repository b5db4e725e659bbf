"""Scores of single objects: AP over thresholds of IoU, and the aggregated Jaccard index."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # .5 to .95

CONVENTIONS = (
    " AP: at each IoU threshold from .5 to .95 in steps of .05 the objects of an image that match one to one are TP, "
    "and TP / (TP + FP + FN) is averaged over thresholds, then over images (the 2018 Data Science Bowl's score; there "
    "is no ranking by confidence, so it is not COCO's AP); AP50 at .5 alone. AJI: the aggregated Jaccard index of each "
    "image (Kumar et al. 2017). An image without objects in label and prediction scores 1, with objects in one of them "
    "0."
)


def object_scores(prediction: Array, label: Array) -> dict[str, float]:
    """`ap`, `ap50` and `aji` of one image.

    Args:
        prediction: (H, W) 0 background, 1..n without gaps.
        label: the same.
    """
    iou, union, inter = _overlaps(prediction, label)
    num_found, num_true = iou.shape
    if not (num_found and num_true):
        return dict.fromkeys(("ap", "ap50", "aji"), float(num_found == num_true))
    scores = []
    for threshold in THRESHOLDS:
        # Above one half an object overlaps at most one other so much; at exactly .5 two could tie.
        matched = min((iou >= threshold).any(axis=1).sum(), (iou >= threshold).any(axis=0).sum())
        scores.append(float(matched / (num_found + num_true - matched)))
    best = iou.argmax(axis=0)  # for each true object
    hit = iou.max(axis=0) > 0
    columns = np.arange(num_true)
    sizes_true, sizes_found = np.bincount(label.ravel())[1:], np.bincount(prediction.ravel())[1:]
    common = inter[best, columns][hit].sum()
    total = union[best, columns][hit].sum() + sizes_true[~hit].sum()
    unused = np.setdiff1d(np.arange(num_found), best[hit])
    return {
        "ap": float(np.mean(scores)),
        "ap50": scores[0],
        "aji": float(common / (total + sizes_found[unused].sum())),
    }


def _overlaps(prediction: Array, label: Array) -> tuple[Array, Array, Array]:
    """IoU, union and intersection (found, true)."""
    num_found, num_true = int(prediction.max(initial=0)), int(label.max(initial=0))
    pairs = prediction.astype(np.int64) * (num_true + 1) + label
    table = np.bincount(pairs.ravel(), minlength=(num_found + 1) * (num_true + 1)).reshape(num_found + 1, num_true + 1)
    inter = table[1:, 1:]
    union = table.sum(axis=1)[1:, None] + table.sum(axis=0)[None, 1:] - inter
    return inter / np.maximum(union, 1), union, inter
