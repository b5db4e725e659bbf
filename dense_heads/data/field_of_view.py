"""The part of a picture that the camera saw: outside of it nothing counts."""

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from dense_heads.data.images import UInt8


def bright_field(image: UInt8, threshold: int) -> npt.NDArray[np.bool_]:
    """The round field of a fundus photograph: the largest bright part, without holes.

    Args:
        image: (H, W, 3).
        threshold: of the brightest channel; the surround is nearly black.

    Returns:
        (H, W), all True where nothing is brighter than `threshold`.
    """
    bright = ndimage.binary_opening(image.max(axis=2) > threshold, iterations=2)
    parts, num = ndimage.label(bright)
    if num == 0:
        return np.ones(image.shape[:2], dtype=bool)
    largest = np.bincount(parts.ravel())[1:].argmax() + 1
    field: npt.NDArray[np.bool_] = ndimage.binary_fill_holes(parts == largest)
    return field
