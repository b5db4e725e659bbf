"""Distances between the surfaces of two masks, in millimetres, for planes and volumes alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class SurfaceDistances:
    """For each surface voxel of one mask the distance to the nearest surface voxel of the other, both ways."""

    to_label: npt.NDArray[np.float64]  # of the prediction's surface
    to_prediction: npt.NDArray[np.float64]  # of the label's surface

    def hausdorff(self, percentile: float = 95.0) -> float:
        """The larger of both directions' percentiles (linear between order statistics)."""
        return float(max(np.percentile(self.to_label, percentile), np.percentile(self.to_prediction, percentile)))

    def average(self) -> float:
        """Average symmetric surface distance: the mean over both surfaces' voxels together."""
        return float(np.concatenate([self.to_label, self.to_prediction]).mean())

    def within(self, tolerance: float) -> float:
        """Surface Dice: the share of both surfaces' voxels that lie within `tolerance` of the other surface."""
        both = np.concatenate([self.to_label, self.to_prediction])
        return float((both <= tolerance * (1 + 1e-6)).mean())  # a distance equal to the tolerance is rounded either way


def surface_distances(prediction: Mask, label: Mask, spacing: Sequence[float]) -> SurfaceDistances:
    """The distances between the surfaces of two masks, neither of them empty.

    A surface voxel is one of the mask with a neighbour across a face outside it; beyond the border of the image is
    outside. (Counting voxels, as MONAI does by default; not sub-voxel areas.)

    Args:
        prediction: bool, two or three dimensions.
        label: the same.
        spacing: mm from voxel to voxel along each axis.
    """
    assert prediction.shape == label.shape and len(spacing) == label.ndim, (prediction.shape, label.shape, spacing)
    assert prediction.any() and label.any()
    box = _bounding_box(prediction | label)
    surfaces = [_surface(mask)[box] for mask in (prediction, label)]
    far = [ndimage.distance_transform_edt(~surface, sampling=spacing) for surface in surfaces]
    return SurfaceDistances(to_label=far[1][surfaces[0]], to_prediction=far[0][surfaces[1]])


def diagonal(shape: Sequence[int], spacing: Sequence[float]) -> float:
    """Length of the image's diagonal in mm: what stands for the distance to a mask that is not there."""
    return float(np.linalg.norm(np.multiply(shape, spacing)))


def _surface(mask: Mask) -> Mask:
    surface: Mask = mask & ~ndimage.binary_erosion(mask)
    return surface


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    box: tuple[slice, ...] = ndimage.find_objects(mask.astype(np.uint8))[0]
    return box
