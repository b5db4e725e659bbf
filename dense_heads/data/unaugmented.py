"""Training steps without chance: what is left of an augmentation when an image is to be seen the same way each time."""

from collections.abc import Mapping
from typing import Any

from dense_heads.data.classification_transforms import CentreView, RandomResizedCrop
from dense_heads.data.depth_transforms import FixedCrop
from dense_heads.data.detection_transforms import BoxCrop, CentreBoxCrop, ScaleToFit
from dense_heads.data.transforms import RandomCrop, RandomScale
from dense_heads.structures import Size

# The import above has already told albumentations not to ask the network for its version.
import albumentations as A  # isort: skip

_WITHOUT_CHANCE = (  # of albumentations, applied always: they bring images to a size or a form
    A.CenterCrop, A.Crop, A.LongestMaxSize, A.Normalize, A.PadIfNeeded, A.Resize, A.SmallestMaxSize, A.ToGray,
)  # fmt: skip


class CentreCrop(RandomCrop):
    """The window of `RandomCrop` in the middle of the image."""

    def _draw(self, shape: Size) -> tuple[int, int]:
        top, left = (max(have - want, 0) // 2 for have, want in zip(shape, self.size, strict=True))
        return top, left


def is_random(step: Any) -> bool:
    """Whether a step of a training pipeline depends on chance."""
    if isinstance(step, RandomScale | ScaleToFit):
        return step.ratio[0] != step.ratio[1]
    if isinstance(step, CentreCrop | CentreBoxCrop | CentreView | FixedCrop):
        return False
    return not (isinstance(step, _WITHOUT_CHANCE) and step.p == 1.0)


def without_chance(steps: Mapping[str, Any]) -> dict[str, Any]:
    """The steps with a random size set to the size itself, random crops to the centre, and what only augments left out.

    A ratio that does not reach 1 goes to its bound that is nearest to 1.
    """
    kept: dict[str, Any] = {}
    for name, step in steps.items():
        if step is None or not is_random(step):
            kept[name] = step
        elif isinstance(step, RandomScale):
            ratio = min(max(1.0, step.ratio[0]), step.ratio[1])
            kept[name] = RandomScale(step.short_side, (ratio, ratio), step.long_side)
        elif isinstance(step, ScaleToFit | RandomResizedCrop):
            kept[name] = step.without_chance()
        elif isinstance(step, BoxCrop):
            kept[name] = CentreBoxCrop(step.size)
        elif isinstance(step, RandomCrop):
            kept[name] = CentreCrop(step.size, cat_max_ratio=1.0)
    return kept
