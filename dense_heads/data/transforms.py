"""Training augmentation and test-time preparation, by the official protocol of DINOv2's segmentation heads.

The steps are those of mmsegmentation 0.27 (facts sheet 3.1), written as albumentations transforms, so that they mix
with albumentations' own. Every random number comes from the transform's own generator, which `TrainPipeline` seeds.
"""

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import IGNORE_INDEX, IMAGENET_MEAN, IMAGENET_STD, Size

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # importing it must not ask the network for its version
import albumentations as A

Array = npt.NDArray[Any]
_MEAN = np.array(IMAGENET_MEAN, dtype=np.float32)
_STD = np.array(IMAGENET_STD, dtype=np.float32)
_LARGEST_IMAGE = 2**28  # pixels after rescaling; beyond it an image is a thin strip, not a photograph


def rescale_size(size: Size, short_side: int, long_side: int | None = None) -> Size:
    """(height, width) that keeps the ratio: as large as fits both limits, sides rounded as int(x + 0.5) (mmcv).

    Raises:
        UserError: the result would have more than 2**28 pixels (an image far longer than wide).
    """
    factor = short_side / min(size)
    if long_side is not None:
        factor = min(factor, long_side / max(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    if height * width > _LARGEST_IMAGE:
        raise UserError(
            f"an image of {size[0]} x {size[1]} (H x W) would become {height} x {width}; expected an image that is not "
            "so thin. Limit it with long_side, or cut the image into pieces."
        )
    return height, width


def normalise(image: Array) -> npt.NDArray[np.float32]:
    """(H, W, C) as float32 with ImageNet's mean and standard deviation taken out.

    uint8, or floating point from 0 to 1. Three channels are RGB; any other number takes the mean over the colours.
    """
    values = image.astype(np.float32) * np.float32(255 if np.issubdtype(image.dtype, np.floating) else 1)
    if image.shape[2] != 3:
        normalised: npt.NDArray[np.float32] = (values - _MEAN.mean()) / _STD.mean()
        return normalised
    return (values - _MEAN) / _STD


def to_tensor(image: npt.NDArray[np.float32]) -> Tensor:
    """(H, W, C) array -> (C, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class RandomScale(A.DualTransform):  # type: ignore[misc]
    """Resize to `short_side` times a random ratio, keeping the image's shape (mmseg Resize with ratio_range).

    The image bilinearly without antialiasing, the mask to the nearest. `long_side`, scaled alike, limits the other
    side (VOC: 2048). The scaled limits are rounded down before they are applied, as mmseg does.
    """

    def __init__(
        self, short_side: int, ratio: Sequence[float] = (0.5, 2.0), long_side: int | None = None, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        if short_side < 1 or (long_side is not None and long_side < short_side):
            raise UserError(
                f"RandomScale: short_side {short_side}, long_side {long_side}; expected 1 <= short <= long."
            )
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] or int(short_side * ratio[0]) < 1:
            raise UserError(f"RandomScale: ratio {list(ratio)}; expected [low, high] with 0 < low <= high.")
        self.short_side, self.long_side, self.ratio = short_side, long_side, (float(ratio[0]), float(ratio[1]))

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the ratio."""
        ratio = float(self.random_generator.uniform(*self.ratio))
        long_side = None if self.long_side is None else int(self.long_side * ratio)
        return {"size": rescale_size(params["shape"][:2], int(self.short_side * ratio), long_side)}

    def apply(self, img: Array, size: Size, **params: Any) -> Array:
        """Resize the image."""
        return _resize(img, size)

    def apply_to_mask(self, mask: Array, size: Size, **params: Any) -> Array:
        """Resize the mask."""
        return _resize(mask, size, cv2.INTER_NEAREST)


class RandomCrop(A.DualTransform):  # type: ignore[misc]
    """Cut a random window; a side shorter than the window is kept whole (mmseg RandomCrop).

    A window in which one class has `cat_max_ratio` or more of the pixels that are not ignored, or which has no second
    class, is drawn again, at most `retries` times; the last drawing stands. Without a mask the first one does.
    """

    def __init__(
        self, size: int | Sequence[int], cat_max_ratio: float = 0.75, retries: int = 10, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.size = _pair(size, "RandomCrop")
        self.cat_max_ratio, self.retries = cat_max_ratio, retries

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the window."""
        shape, mask = params["shape"][:2], data.get("mask")
        top, left = self._draw(shape)
        if mask is not None and self.cat_max_ratio < 1:
            for _ in range(self.retries):
                if self._is_mixed(mask[top : top + self.size[0], left : left + self.size[1]]):
                    break
                top, left = self._draw(shape)
        return {"top": top, "left": left}

    def apply(self, img: Array, top: int, left: int, **params: Any) -> Array:
        """Cut image or mask."""
        return img[top : top + self.size[0], left : left + self.size[1]]

    def apply_to_mask(self, mask: Array, top: int, left: int, **params: Any) -> Array:
        """Cut the mask."""
        return mask[top : top + self.size[0], left : left + self.size[1]]

    def _draw(self, shape: Size) -> tuple[int, int]:
        top, left = (
            int(self.random_generator.integers(0, max(n - c, 0) + 1)) for n, c in zip(shape, self.size, strict=True)
        )
        return top, left

    def _is_mixed(self, mask: Array) -> bool:
        counts = np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)
        counts[IGNORE_INDEX] = 0
        return bool((counts > 0).sum() > 1 and counts.max() / counts.sum() < self.cat_max_ratio)


class PhotoMetricDistortion(A.ImageOnlyTransform):  # type: ignore[misc]
    """Brightness, contrast, saturation and hue, each with probability 0.5, on 8-bit values with clipping (mmseg).

    Order: brightness; contrast, here or at the end by a coin; saturation; hue. Every step rounds down to 8 bits, and
    saturation and hue each go to HSV and back, as the original does.

    Args:
        brightness: added, from -brightness to +brightness.
        contrast: factor, from low to high.
        saturation: factor, from low to high.
        hue: added on OpenCV's scale of 180 steps, whole numbers from -hue to hue - 1 (mmseg uses numpy's randint).
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: int = 18,
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        for name, (low, high) in (("contrast", contrast), ("saturation", saturation)):
            if not 0 <= low <= high:
                raise UserError(f"PhotoMetricDistortion: {name} {[low, high]}; expected [low, high] with 0 <= low.")
        if brightness < 0 or not 0 <= hue <= 90:
            raise UserError(f"PhotoMetricDistortion: brightness {brightness}, hue {hue}; expected >= 0, and hue <= 90.")
        self.brightness, self.hue = float(brightness), hue
        self.contrast, self.saturation = tuple(contrast), tuple(saturation)

    def get_params(self) -> dict[str, Any]:
        """Draw which steps are taken, and how far; None = not taken."""
        rng = self.random_generator

        def maybe(low: float, high: float) -> float | None:
            return float(rng.uniform(low, high)) if rng.integers(2) else None

        params: dict[str, Any] = {"brightness": maybe(-self.brightness, self.brightness)}
        params["contrast_first"] = bool(rng.integers(2))
        params["contrast"] = maybe(*self.contrast)
        params["saturation"] = maybe(*self.saturation)
        params["hue"] = int(rng.integers(-self.hue, self.hue)) if rng.integers(2) and self.hue else None
        return params

    def apply(
        self,
        img: Array,
        brightness: float | None,
        contrast_first: bool,
        contrast: float | None,
        saturation: float | None,
        hue: int | None,
        **params: Any,
    ) -> Array:
        """Distort an RGB image."""
        if brightness is not None:
            img = cv2.LUT(img, _table(beta=brightness))
        if contrast is not None and contrast_first:
            img = cv2.LUT(img, _table(alpha=contrast))
        if saturation is not None:
            img = _in_hsv(img, 1, _table(alpha=saturation))
        if hue is not None:
            img = _in_hsv(img, 0, ((np.arange(256) + hue) % 180).astype(np.uint8))
        if contrast is not None and not contrast_first:
            img = cv2.LUT(img, _table(alpha=contrast))
        return img


class Normalise(A.ImageOnlyTransform):  # type: ignore[misc]
    """`normalise` as a step."""

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def apply(self, img: Array, **params: Any) -> Array:
        """Normalise the image."""
        return normalise(img)


class PadTo(A.DualTransform):  # type: ignore[misc]
    """Pad on the right and below to `size`: the (normalised) image with 0, the mask with 255 (mmseg Pad)."""

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__(p=1.0)
        self.size = _pair(size, "PadTo")

    def apply(self, img: Array, **params: Any) -> Array:
        """Pad the image."""
        return self._pad(img, 0)

    def apply_to_mask(self, mask: Array, **params: Any) -> Array:
        """Pad the mask."""
        return self._pad(mask, IGNORE_INDEX)

    def _pad(self, array: Array, value: int) -> Array:
        below, right = (want - have for want, have in zip(self.size, array.shape[:2], strict=True))
        if below < 0 or right < 0:
            raise UserError(
                f"after the steps of augmentation an image is {array.shape[0]} x {array.shape[1]} (H x W), larger than "
                f"the {self.size[0]} x {self.size[1]} of a training image. Add a RandomCrop step of that size."
            )
        return np.pad(array, ((0, below), (0, right), *[(0, 0)] * (array.ndim - 2)), constant_values=value)


class TrainPipeline:
    """Augmentation of one training sample: the given steps in order, then normalise, pad to `size`, make tensors.

    `set_random_seed` fixes every random choice of the next call. Each step gets its own stream, by its name:
    albumentations' `Compose.set_random_seed` would give all steps the same numbers (two flips would always agree); and
    taking a step out leaves what the others draw unchanged.

    Args:
        steps: albumentations transforms or compositions by name, in order; None leaves one out.
        size: (height, width), or the side of a square, that every training image has in the end.
    """

    def __init__(self, steps: Mapping[str, A.BasicTransform | A.BaseCompose | None], size: int | Sequence[int]) -> None:
        self.steps = {name: step for name, step in steps.items() if step is not None}
        self.size = _pair(size, "TrainPipeline")
        self._compose = A.Compose([*self.steps.values(), Normalise(), PadTo(self.size)])

    def set_random_seed(self, seed: int) -> None:
        """Make the next call a function of `seed` alone."""
        for name, step in self.steps.items():
            own = stable_seed(seed, name)
            step.set_random_state(np.random.default_rng(own), random.Random(own))

    def __call__(self, image: Array, mask: Array | None = None) -> tuple[Tensor, Tensor | None]:
        """(H, W, C) uint8 or 0..1, and (H, W) train ids -> (C, *size) float32 and (*size) int64."""
        if mask is None:
            return to_tensor(self._compose(image=image)["image"]), None
        out = self._compose(image=image, mask=mask.astype(np.uint8))  # 8 bits: ids are at most 255, OpenCV is quick
        return to_tensor(out["image"]), torch.from_numpy(out["mask"].astype(np.int64))


class EvalTransform:
    """An image as it is tested: normalised tensors, one for each test scale (mmseg MultiScaleFlipAug without flips).

    Every scale is resized from the original 8-bit image, bilinearly, to `rescale_size` of the limits times the scale,
    rounded down. Without `short_side` the image keeps its own size, or is made smaller until `long_side` holds.
    """

    def __init__(self, short_side: int | None, long_side: int | None = None, scales: Sequence[float] = (1.0,)) -> None:
        if not scales or min(scales) <= 0:
            raise UserError(f"test scales {list(scales)}; expected at least one, all positive, such as [1.0].")
        limits = [side for side in (short_side, long_side) if side is not None]
        if any(int(side * min(scales)) < 1 for side in limits) or (len(limits) == 2 and limits[0] > limits[1]):
            raise UserError(f"short_side {short_side}, long_side {long_side}; expected 1 <= short_side <= long_side.")
        self.short_side, self.long_side, self.scales = short_side, long_side, tuple(float(s) for s in scales)

    def sizes(self, size: Size) -> list[Size]:
        """(height, width) of each view of an image of that size."""
        short, long = self.short_side, self.long_side
        if short is None:
            factor = 1.0 if long is None else min(1.0, long / max(size))
            short = max(1, int(min(size) * factor + 0.5))
            long = max(1, int(max(size) * factor + 0.5))
        limits = [(max(1, int(short * s)), None if long is None else max(1, int(long * s))) for s in self.scales]
        return [rescale_size(size, *limit) for limit in limits]

    def __call__(self, image: Array) -> list[Tensor]:
        """(H, W, C) uint8 or 0..1 -> for each scale a (C, h, w) float32 tensor."""
        return [to_tensor(normalise(_resize(image, size))) for size in self.sizes(image.shape[:2])]


def _resize(array: Array, size: Size, interpolation: int = cv2.INTER_LINEAR) -> Array:
    if array.shape[:2] == tuple(size):
        return array
    resized: Array = cv2.resize(array, (size[1], size[0]), interpolation=interpolation)
    return resized[..., None] if resized.ndim < array.ndim else resized  # OpenCV drops a single channel


def _table(alpha: float = 1.0, beta: float = 0.0) -> npt.NDArray[np.uint8]:
    """All 256 results of value * alpha + beta, clipped and rounded down: exact, and quicker than the arithmetic."""
    table: npt.NDArray[np.uint8] = np.clip(np.arange(256, dtype=np.float32) * alpha + beta, 0, 255).astype(np.uint8)
    return table


def _in_hsv(image: Array, channel: int, table: npt.NDArray[np.uint8]) -> Array:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = cv2.LUT(np.ascontiguousarray(hsv[..., channel]), table)
    distorted: Array = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return distorted


def _pair(size: int | Sequence[int], owner: str) -> Size:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise UserError(f"{owner}: size {size}; expected a positive side, or [height, width].")
    return pair[0], pair[1]
