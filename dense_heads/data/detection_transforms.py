"""Augmentation of an image with its boxes and instance masks in step, and test-time preparation.

Steps are albumentations transforms. Instance masks pass through them as a few layers of instance numbers (objects that
do not touch share a layer), since a large image with hundreds of objects would not fit as one mask for each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.data.objects import Objects
from dense_heads.data.transforms import EvalTransform, Normalise, RandomCrop, TrainPipeline, _pair, _resize, to_tensor
from dense_heads.errors import UserError
from dense_heads.ops import masks
from dense_heads.structures import Size

# The import above has already told albumentations not to ask the network for its version.
import albumentations as A  # isort: skip
import cv2  # isort: skip

Array = npt.NDArray[Any]
_SMALLEST = 1.0  # pixels of a side: what is thinner after augmentation is no object to learn


def fitting_size(size: Size, room: Size, ratio: float = 1.0) -> Size:
    """(height, width) of an image of `size` that fills `room` as far as its shape allows, times a ratio."""
    factor = min(room[0] / size[0], room[1] / size[1]) * ratio
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


class ScaleToFit(A.DualTransform):  # type: ignore[misc]
    """Resize so that the image fills `size`, keeping its shape, times a random ratio (large-scale jitter).

    The image bilinearly, masks to the nearest; a ratio above 1 leaves what a crop then cuts.
    """

    def __init__(self, size: int | Sequence[int], ratio: Sequence[float] = (1.0, 1.0), p: float = 1.0) -> None:
        super().__init__(p=p)
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1]:
            raise UserError(f"ScaleToFit: ratio {list(ratio)}; expected [low, high] with 0 < low <= high.")
        self.size, self.ratio = _pair(size, "ScaleToFit"), (float(ratio[0]), float(ratio[1]))

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the ratio."""
        ratio = float(self.random_generator.uniform(*self.ratio))
        return {"size": fitting_size(params["shape"][:2], self.size, ratio)}

    def apply(self, img: Array, size: Size, **params: Any) -> Array:
        """Resize the image."""
        return _resize(img, size)

    def apply_to_mask(self, mask: Array, size: Size, **params: Any) -> Array:
        """Resize a mask."""
        return _resize(mask, size, cv2.INTER_NEAREST)

    def apply_to_bboxes(self, bboxes: Array, **params: Any) -> Array:
        """Boxes are shares of the image: a resize leaves them."""
        return bboxes

    def without_chance(self) -> "ScaleToFit":
        """The same with the one ratio of its range that is nearest to 1."""
        ratio = min(max(1.0, self.ratio[0]), self.ratio[1])
        return ScaleToFit(self.size, (ratio, ratio))


class BoxCrop(RandomCrop):
    """Cut a random window; a side shorter than the window is kept whole. Boxes are cut in step."""

    def __init__(self, size: int | Sequence[int], p: float = 1.0) -> None:
        super().__init__(size, cat_max_ratio=1.0, p=p)

    def apply_to_bboxes(self, bboxes: Array, top: int, left: int, **params: Any) -> Array:
        """Boxes (n, 4+) as shares of the image -> of the window."""
        height, width = params["shape"][:2]
        rows, columns = min(self.size[0], height - top), min(self.size[1], width - left)
        moved = bboxes.copy()
        moved[:, [0, 2]] = (bboxes[:, [0, 2]] * width - left) / columns
        moved[:, [1, 3]] = (bboxes[:, [1, 3]] * height - top) / rows
        return moved


class CentreBoxCrop(BoxCrop):
    """The window of `BoxCrop` in the middle of the image."""

    def _draw(self, shape: Size) -> tuple[int, int]:
        top, left = (max(have - want, 0) // 2 for have, want in zip(shape, self.size, strict=True))
        return top, left


class DetectionTrainPipeline(TrainPipeline):
    """`TrainPipeline` for objects: the given steps in order, then normalise, pad on the right and below.

    Of a box of which less than `min_visibility` of its area is left, nothing is learnt. Crowds and difficult objects
    are left out before.

    Args:
        steps: albumentations transforms or compositions by name, in order; None leaves one out.
        size: (height, width), or the side of a square, that every training image has in the end.
        with_masks: whether instance masks are wanted; objects without an outline are then left out.
        min_visibility: share of a box's area that must be left by the steps.
    """

    def __init__(
        self,
        steps: Mapping[str, A.BasicTransform | A.BaseCompose | None],
        size: int | Sequence[int],
        with_masks: bool = False,
        min_visibility: float = 0.1,
    ) -> None:
        super().__init__(steps, size)
        self.with_masks = with_masks
        boxes = A.BboxParams(
            "pascal_voc",
            label_fields=["number"],
            min_visibility=min_visibility,
            min_width=_SMALLEST,
            min_height=_SMALLEST,
            clip=True,
            filter_invalid_bboxes=True,
        )
        self._compose = A.Compose([*self.steps.values(), Normalise()], bbox_params=boxes)

    def augment(self, image: npt.NDArray[np.uint8], objects: Objects) -> dict[str, Tensor]:
        """(H, W, 3) uint8 and its objects -> image (3, *size), boxes (n, 4) float32, labels (n,), instance_masks."""
        objects = objects.chosen(~objects.iscrowd & ~objects.difficult)
        layers: list[Array] = []
        if self.with_masks:
            objects = objects.chosen(np.array([outline is not None for outline in objects.outlines], dtype=bool))
            layers = _layers(objects)
        out = self._compose(
            image=image,
            bboxes=objects.boxes,
            number=np.arange(len(objects)),
            masks=np.stack(layers) if layers else np.zeros((1, *image.shape[:2]), np.uint16),
        )
        boxes = np.asarray(out["bboxes"], dtype=np.float32).reshape(-1, 4)
        numbers = np.asarray(out["number"], dtype=np.int64).reshape(-1)
        made = {"image": self._padded(to_tensor(out["image"]))}
        if self.with_masks:
            shown = _of_layers(np.asarray(out["masks"]), numbers)
            seen = shown.any(axis=(1, 2))
            boxes, numbers = boxes[seen], numbers[seen]
            made["instance_masks"] = self._padded(torch.from_numpy(shown[seen]))
        made["boxes"] = torch.from_numpy(boxes.copy())
        made["labels"] = torch.from_numpy(objects.labels[numbers])
        return made

    def _padded(self, pixels: Tensor) -> Tensor:
        """(..., H, W) -> (..., *size): 0 is the mean colour of a normalised image."""
        below, right = (want - have for want, have in zip(self.size, pixels.shape[-2:], strict=True))
        if below < 0 or right < 0:
            raise UserError(
                f"after the steps of augmentation an image is {pixels.shape[-2]} x {pixels.shape[-1]} (H x W), larger "
                f"than the {self.size[0]} x {self.size[1]} of a training image. Add a BoxCrop step of that size."
            )
        return F.pad(pixels, (0, right, 0, below))


class DetectionEvalTransform(EvalTransform):
    """An image as it is tested: resized to fill `size` as far as its shape allows, once for each scale; never padded.

    Args:
        size: (height, width), or the side of a square; None keeps the image's own size.
        scales: of the size; several are looked at and their boxes merged.

    Raises:
        UserError: values that make no sense.
    """

    def __init__(self, size: int | Sequence[int] | None = None, scales: Sequence[float] = (1.0,)) -> None:
        super().__init__(None, None, scales)
        self.size = None if size is None else _pair(size, "transforms.eval")

    def sizes(self, size: Size) -> list[Size]:
        """(height, width) of each view of an image of that size."""
        return [fitting_size(size, self.size or size, scale) for scale in self.scales]


def _layers(objects: Objects) -> list[Array]:
    """Instance numbers from 1 on, (H, W) uint16 each; objects that overlap stand in different layers."""
    layers: list[Array] = []
    for number, code in enumerate(objects.codes(), start=1):
        assert code is not None and number < 2**16
        mask = masks.decode(code, objects.size)
        free = next((layer for layer in layers if not layer[mask].any()), None)
        if free is None:
            free = np.zeros(objects.size, np.uint16)
            layers.append(free)
        free[mask] = number
    return layers


def _of_layers(layers: Array, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(L, H, W) -> (n, H, W): the mask of each instance number (counted from 0)."""
    shown = np.zeros((len(numbers), *layers.shape[1:]), dtype=bool)
    for layer in layers:
        for place, number in enumerate(numbers):
            shown[place] |= layer == number + 1
    return shown
