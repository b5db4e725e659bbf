"""Segmentation by grey alone: Otsu's thresholds, the simplest thing that scores of medical images are read beside."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from dense_heads.data.checks import spread
from dense_heads.data.images import UInt8
from dense_heads.structures import IGNORE_INDEX

Ids = npt.NDArray[np.int64]

MOST_CLASSES = 4  # of several thresholds all places are tried: more would take minutes
_MOST_CASES = 64  # of training cases that decide which range is which class


@dataclass(frozen=True)
class Case:
    """An image, or a volume (here a part of its slices will do)."""

    items: list[Any]  # MedicalItem of each slice
    grey: UInt8  # (S, H, W)
    label: Ids  # (S, H, W), 255 counts nowhere

    def ranges(self, num: int) -> Ids:
        """(S, H, W): which range of this case's grey each pixel is in, 0 darkest."""
        return grey_ranges(self.grey, self.label != IGNORE_INDEX, num)


def cases_of(dataset: Any, num: int | None = None, most: int | None = None) -> Iterator[Case]:
    """The cases of a data set of medical images or slices, as evaluation sees them.

    Args:
        dataset: ImageDataset, SliceDataset, or a Part of one.
        num: only of the first so many samples.
        most: only so many cases, spread evenly.
    """
    places: dict[str, list[int]] = {}
    for index, sample in enumerate(dataset.samples[:num]):
        places.setdefault(getattr(sample, "case", sample).image_id, []).append(index)
    chosen = list(places.values())
    for indices in chosen if most is None else spread(chosen, most):
        items = [dataset[index] for index in indices]
        grey = np.stack([cv2.cvtColor(dataset.picture(index), cv2.COLOR_RGB2GRAY) for index in indices])
        yield Case(items, grey, np.stack([item["mask"].numpy() for item in items]))


def grey_ranges(grey: UInt8, counted: npt.NDArray[np.bool_], num: int) -> Ids:
    """Which of `num` ranges of grey each pixel is in, 0 darkest: cut so that grey varies least within ranges.

    Otsu, IEEE Transactions on Systems, Man, and Cybernetics 1979; with several thresholds Liao et al., Journal of
    Information Science and Engineering 2001; by scikit-image.

    Args:
        grey: of any shape.
        counted: of the same shape; the thresholds are chosen over these pixels, such as a camera's field of view.
        num: at least 2.
    """
    from skimage.filters import threshold_multiotsu, threshold_otsu

    values = grey[counted]
    if len(np.unique(values)) < num:  # too flat to be parted
        return np.zeros(grey.shape, dtype=np.int64)
    cuts = [threshold_otsu(values)] if num == 2 else threshold_multiotsu(values, classes=num)
    ranges: Ids = np.digitize(grey, cuts, right=True)  # a threshold belongs to the range below it
    return ranges


def class_of_ranges(cases: Iterable[Case], num: int) -> Sequence[int]:
    """The class of each range of grey, dark to bright: each class one range, so that the mean Dice is largest.

    The mean is over cases and classes without the background, which takes the range that is left.
    """
    dice = np.zeros((num, num))  # range, class; summed over the cases
    for case in cases:
        ranges, counted = case.ranges(num), case.label != IGNORE_INDEX
        pairs = np.bincount(ranges[counted] * num + case.label[counted], minlength=num * num).reshape(num, num)
        sizes = pairs.sum(axis=1, keepdims=True) + pairs.sum(axis=0, keepdims=True)
        dice += np.where(sizes > 0, 2 * pairs / np.maximum(sizes, 1), 1)
    dice[:, 0] = 0
    chosen: list[int] = linear_sum_assignment(dice, maximize=True)[1].tolist()
    return chosen


def decided_on(train: Any, num: int) -> Sequence[int]:
    """`class_of_ranges` of a training split, or of the support of a head without training."""
    return class_of_ranges(cases_of(train, most=_MOST_CASES), num)
