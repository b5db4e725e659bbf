"""Augmentation of image and depth together, and test-time preparation, by the protocol of DINOv2's depth heads.

The steps are those of the Monocular-Depth-Estimation-Toolbox (facts sheet 3.2), written as albumentations transforms.
Depth goes through them as the mask: float32 metres, moved to the nearest pixel and never blended, for a value between
two surfaces belongs to neither. What geometry makes up is 0, no measurement.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dense_heads.data.transforms import EvalTransform, Normalise, PadTo, TrainPipeline, to_tensor
from dense_heads.errors import UserError, unknown_name
from dense_heads.structures import Size

# The import above has already told albumentations not to ask the network for its version.
import albumentations as A  # isort: skip

Array = npt.NDArray[Any]
Window = tuple[int, int, int, int]  # top, left, bottom, right; the last two exclusive


class FixedCrop(A.DualTransform):  # type: ignore[misc]
    """Cut out rows `top` to `bottom` and columns `left` to `right`, the ends exclusive.

    NYU Depth v2 trains inside rows 45:472 and columns 43:608, where the Kinect's colour and depth both reach.
    """

    def __init__(self, top: int, left: int, bottom: int, right: int) -> None:
        super().__init__(p=1.0)
        if not (0 <= top < bottom and 0 <= left < right):
            raise UserError(
                f"FixedCrop: rows {top}:{bottom}, columns {left}:{right}; expected each to start at 0 or later and to "
                "end after its start."
            )
        self.top, self.left, self.bottom, self.right = top, left, bottom, right

    def window(self, size: Size) -> Window:
        """The window of an image of (height, width).

        Raises:
            UserError: the image does not reach so far.
        """
        if size[0] < self.bottom or size[1] < self.right:
            raise UserError(
                f"an image of {size[0]} x {size[1]} (H x W) does not hold the crop of rows {self.top}:{self.bottom}, "
                f"columns {self.left}:{self.right}. Expected images of the size that the crop was made for; take the "
                "step out with null."
            )
        return self.top, self.left, self.bottom, self.right

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Place the window."""
        return {"window": self.window(params["shape"][:2])}

    def apply(self, img: Array, window: Window, **params: Any) -> Array:
        """Cut the image."""
        return cut(img, window)

    def apply_to_mask(self, mask: Array, window: Window, **params: Any) -> Array:
        """Cut the depth."""
        return cut(mask, window)


class KBCrop(FixedCrop):
    """Cut KITTI's frames, whose sizes differ by a few pixels, to one: the bottom rows, the middle columns.

    top = H - height, left = (W - width) // 2: the KITTI benchmark's own crop.
    """

    def __init__(self, height: int = 352, width: int = 1216) -> None:
        super().__init__(0, 0, height, width)

    def window(self, size: Size) -> Window:
        """The window of an image of (height, width)."""
        _, _, height, width = super().window(size)
        top, left = size[0] - height, (size[1] - width) // 2
        return top, left, top + height, left + width


class RandomRotate(A.DualTransform):  # type: ignore[misc]
    """Turn about the image's centre by -degrees to +degrees; corners that come in are black, without measurement.

    The image bilinearly, depth to the nearest.
    """

    def __init__(self, degrees: float = 2.5, p: float = 0.5) -> None:
        super().__init__(p=p)
        if not 0 <= degrees <= 180:
            raise UserError(f"RandomRotate: degrees {degrees}; expected 0 to 180, such as 2.5.")
        self.degrees = float(degrees)

    def get_params(self) -> dict[str, Any]:
        """Draw the angle, in degrees, clockwise."""
        return {"angle": float(self.random_generator.uniform(-self.degrees, self.degrees))}

    def apply(self, img: Array, angle: float, **params: Any) -> Array:
        """Turn the image."""
        return _rotate(img, angle, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: Array, angle: float, **params: Any) -> Array:
        """Turn the depth."""
        return _rotate(mask, angle, cv2.INTER_NEAREST)


class ColorAug(A.ImageOnlyTransform):  # type: ignore[misc]
    """Gamma, brightness and one factor for each channel, in this order, on values of 0 to 255, clipped at the end.

    As in the original the gamma is an exponent of the 0 to 255 values themselves: 0.9 to 1.1 is a change of the
    brightness too, and a strong one. The result is float32, not rounded; a step on 8-bit values cannot follow.
    """

    def __init__(
        self,
        gamma: Sequence[float] = (0.9, 1.1),
        brightness: Sequence[float] = (0.75, 1.25),
        color: Sequence[float] = (0.9, 1.1),
        p: float = 0.5,
    ) -> None:
        super().__init__(p=p)
        for name, bounds in (("gamma", gamma), ("brightness", brightness), ("color", color)):
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise UserError(f"ColorAug: {name} {list(bounds)}; expected [low, high] with 0 < low <= high.")
        self.gamma, self.brightness, self.color = tuple(gamma), tuple(brightness), tuple(color)

    def get_params(self) -> dict[str, Any]:
        """Draw the exponent and the factors."""
        rng = self.random_generator
        return {
            "exponent": float(rng.uniform(*self.gamma)),
            "factor": float(rng.uniform(*self.brightness)),
            "factors": rng.uniform(*self.color, size=3),
        }

    def apply(self, img: Array, exponent: float, factor: float, factors: Array, **params: Any) -> Array:
        """Change the colours of an RGB image."""
        table = np.arange(256, dtype=np.float64) ** exponent * factor  # of every value there is: quicker than of pixels
        return np.clip(table[img] * factors, 0, 255).astype(np.float32)


class PadDepthTo(PadTo):
    """Pad on the right and below to `size`: the (normalised) image with 0, depth with 0 = no measurement."""

    def apply_to_mask(self, mask: Array, **params: Any) -> Array:
        """Pad the depth."""
        return self._pad(mask, 0)


class DepthTrainPipeline(TrainPipeline):
    """`TrainPipeline` for depth in place of classes: seeded alike, depth stays float32 metres.

    Args:
        steps: albumentations transforms or compositions by name, in order; None leaves one out.
        size: (height, width), or the side of a square, that every training image has in the end.
    """

    def __init__(self, steps: Mapping[str, A.BasicTransform | A.BaseCompose | None], size: int | Sequence[int]) -> None:
        super().__init__(steps, size)
        self._compose = A.Compose([*self.steps.values(), Normalise(), PadDepthTo(self.size)])

    def __call__(self, image: npt.NDArray[np.uint8], mask: Array | None = None) -> tuple[Tensor, Tensor | None]:
        """(H, W, 3) uint8 and, as `mask`, (H, W) metres -> (3, *size) float32 and (*size) float32 metres."""
        if mask is None:
            return to_tensor(self._compose(image=image)["image"]), None
        out = self._compose(image=image, mask=mask)
        assert out["mask"].dtype == np.float32, "a step changed the type of depth"
        return to_tensor(out["image"]), torch.from_numpy(np.ascontiguousarray(out["mask"]))


class DepthEvalTransform(EvalTransform):
    """An image as it is tested, and where image and label are cut before that.

    Called on an image it gives the model's views and cuts nothing: a person who asks for the depth of a picture wants
    all of it. The data set takes `window` first, since the published evaluation cuts image and label alike.

    Args:
        short_side, long_side, scales: as for EvalTransform.
        size: (height, width) of the views, ignoring the image's shape (SUN RGB-D: 480 x 640), in place of sides.
        crop: `kb`: KITTI's frames are cut to 352 x 1216, as by KBCrop; None: nothing is cut.

    Raises:
        UserError: values that contradict each other, or an unknown crop.
    """

    def __init__(
        self,
        short_side: int | None = None,
        long_side: int | None = None,
        scales: Sequence[float] = (1.0,),
        size: Sequence[int] | None = None,
        crop: str | None = None,
    ) -> None:
        super().__init__(short_side, long_side, scales)
        if size is not None and (len(size) != 2 or min(size) < 1 or short_side is not None or long_side is not None):
            raise UserError(
                f"size {list(size)} with short_side {short_side}, long_side {long_side}; expected size as [height, "
                "width], and then no sides."
            )
        if crop not in (None, "kb"):
            raise unknown_name("crop of transforms.eval", str(crop), ["kb"])
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.crop = None if crop is None else KBCrop()

    def window(self, size: Size) -> Window:
        """What of an image and its label of (height, width) is measured."""
        return (0, 0, *size) if self.crop is None else self.crop.window(size)

    def sizes(self, size: Size) -> list[Size]:
        """(height, width) of each view of an image of that size."""
        if self.size is None:
            return super().sizes(size)
        return [(max(1, int(self.size[0] * s)), max(1, int(self.size[1] * s))) for s in self.scales]


def cut(array: Array, window: Window) -> Array:
    """The window of an (H, W, ...) array."""
    top, left, bottom, right = window
    return array[top:bottom, left:right]


def _rotate(array: Array, angle: float, interpolation: int) -> Array:
    height, width = array.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -angle, 1.0)
    rotated: Array = cv2.warpAffine(array, matrix, (width, height), flags=interpolation)
    return rotated
