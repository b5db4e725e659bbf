"""Single objects from probabilities: connected components, or a watershed from inside and border."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from dense_heads.errors import UserError, unknown_name

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


METHODS = ("watershed", "components")


@dataclass(frozen=True)
class Objects:
    """How the objects of an image are told apart.

    Args:
        method: `watershed` of a head that predicts background, inside and border (three outputs); `components` of one
            that predicts background and foreground (two).
        min_size: objects with fewer pixels go.

    Raises:
        UserError: an unknown method.
    """

    method: str = "watershed"
    min_size: int = 10

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("task.instances.method:", str(self.method), METHODS)

    @property
    def num_outputs(self) -> int:
        """Channels of the head."""
        return 3 if self.method == "watershed" else 2

    def merged(self, probabilities: Tensor) -> Tensor:
        """(num_outputs, H, W) -> probabilities of background and foreground (2, H, W)."""
        return torch.stack([probabilities[0], probabilities[1:].sum(dim=0)])

    def found(self, probabilities: Array) -> npt.NDArray[np.int32]:
        """(num_outputs, H, W) -> objects (H, W), 0 background, 1..n."""
        if self.method == "watershed":
            return watershed(probabilities[1] + probabilities[2], probabilities[1], self.min_size)
        return components(probabilities[1] > 0.5, self.min_size)


def components(mask: Mask, min_size: int = 0) -> npt.NDArray[np.int32]:
    """Connected parts of a mask (across faces), 1..n in reading order; those with fewer pixels than `min_size` go."""
    parts, _ = ndimage.label(mask)
    return numbered(parts, min_size)


def watershed(foreground: Array, inside: Array, min_size: int = 0) -> npt.NDArray[np.int32]:
    """Objects that touch, told apart by their borders.

    Each connected part of what is surely inside grows over the foreground, less probable places last; foreground that
    no such part reaches is an object by itself.

    Args:
        foreground: (H, W) probability of any object, its border included.
        inside: (H, W) probability of the inside.
        min_size: objects with fewer pixels go.

    Returns:
        (H, W) int32, 0 background, 1..n.
    """
    try:
        from skimage.segmentation import watershed as flood
    except ImportError as error:
        raise UserError("A watershed needs scikit-image: pip install 'dense-heads[medical]'.") from error
    mask = foreground > 0.5
    seeds, num = ndimage.label((inside > 0.5) & mask)
    whole, _ = ndimage.label(mask)
    lonely = mask & ~np.isin(whole, np.unique(whole[seeds > 0]))
    seeds = np.where(lonely, num + whole, seeds)
    return numbered(flood(-inside, seeds, mask=mask), min_size)


def numbered(objects: Array, min_size: int = 0) -> npt.NDArray[np.int32]:
    """Objects renumbered 1..n without gaps, those with fewer pixels than `min_size` left out."""
    sizes = np.bincount(objects.ravel())
    keep = sizes >= max(min_size, 1)
    keep[0] = False
    numbers = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return numbers[objects]


def largest_only(labels: Array, num_classes: int) -> Array:
    """Of each class but the background the largest connected part; the rest becomes background.

    Args:
        labels: class ids, two or three dimensions.
        num_classes: how many there are, the background included.
    """
    kept = np.zeros_like(labels)
    for number in range(1, num_classes):
        parts, num = ndimage.label(labels == number)
        if num:
            kept[parts == np.bincount(parts.ravel())[1:].argmax() + 1] = number
    return kept
