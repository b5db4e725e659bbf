"""How image-level protocols look at a picture (facts sheet 3.3; DINOv2 data/transforms.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

from dense_heads.data.crops import random_box
from dense_heads.data.images import UInt8
from dense_heads.data.transforms import Array, EvalTransform
from dense_heads.errors import UserError
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD

# The import above has already told albumentations not to ask the network for its version.
import albumentations as A  # isort: skip


def center_picture(image: UInt8, resize: int, crop: int) -> Any:
    """(H, W, 3) -> a PIL image: the short side resized (bicubic, antialiased), then the centre of `crop` pixels."""
    picture = TF.resize(Image.fromarray(image), [resize], interpolation=TF.InterpolationMode.BICUBIC, antialias=True)
    return TF.center_crop(picture, [crop, crop])


def center_view(image: UInt8, resize: int, crop: int) -> Tensor:
    """The same, ImageNet-normalised: (3, crop, crop)."""
    pixels = torch.from_numpy(np.array(center_picture(image, resize, crop))).permute(2, 0, 1).float()
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def published_resize(crop: int) -> int:
    """The short side of which the centre of `crop` pixels is cut out: 256 for 224."""
    return round(crop * 256 / 224)


class RandomResizedCrop(A.ImageOnlyTransform):  # type: ignore[misc]
    """A random box of the image, of 3:4 to 4:3, resized to a square (bicubic, antialiased, as torchvision's)."""

    def __init__(self, size: int, scale: Sequence[float] = (0.08, 1.0), p: float = 1.0) -> None:
        """`scale`: the least and the largest share of the image's area."""
        super().__init__(p=p)
        if size < 1 or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(f"RandomResizedCrop: size {size}, scale {list(scale)}; expected 0 < low <= high <= 1.")
        self.size, self.scale = size, (float(scale[0]), float(scale[1]))

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the box."""
        height, width = params["shape"][:2]
        return {"box": random_box(height, width, self.scale, self.random_generator)}

    def apply(self, img: Array, box: tuple[int, int, int, int], **params: Any) -> Array:
        """Cut and resize."""
        return np.array(TF.resized_crop(Image.fromarray(img), *box, [self.size] * 2, TF.InterpolationMode.BICUBIC))

    def without_chance(self) -> "CentreView":
        """What tests see, in the published proportion of 256 to 224."""
        return CentreView(published_resize(self.size), self.size)


class CentreView(A.ImageOnlyTransform):  # type: ignore[misc]
    """The short side resized (bicubic, antialiased), then the centre: always the same."""

    def __init__(self, resize: int, crop: int) -> None:
        super().__init__(p=1.0)
        self.resize, self.crop = resize, crop

    def apply(self, img: Array, **params: Any) -> Array:
        """Resize and cut."""
        return np.array(center_picture(img, self.resize, self.crop))


class CentreEvalTransform(EvalTransform):
    """An image as it is tested: one normalised view (3, crop, crop)."""

    def __init__(self, resize: int | None = None, crop: int = 224) -> None:
        """`resize`: the short side before the centre is cut out; None: in the published proportion to `crop`.

        Raises:
            UserError: sizes that make no sense.
        """
        resize = published_resize(crop) if resize is None else resize
        if not 1 <= crop <= resize:
            raise UserError(f"task.transforms.eval: crop={crop}, resize={resize}; expected 1 <= crop <= resize.")
        super().__init__(resize)
        self.resize, self.crop = resize, crop

    def __call__(self, image: Array) -> list[Tensor]:
        """(H, W, 3) uint8 -> [(3, crop, crop)]."""
        return [center_view(image, self.resize, self.crop)]
