"""Multi-crop augmentation of self-supervised training (facts sheet 4.1; DINOv2 data/augmentations.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

from dense_heads.data.images import UInt8
from dense_heads.errors import UserError, unknown_name
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import IMAGENET_MEAN, IMAGENET_STD

BLUR_KERNEL, BLUR_SIGMA = 9, (0.1, 2.0)
SOLARIZE_THRESHOLD = 128
# Of global crop 1, global crop 2, local crops.
BLUR = {"published": (1.0, 0.1, 0.5), "released": (0.0, 0.9, 0.5), "none": (0.0, 0.0, 0.0)}


@dataclass(frozen=True)
class CropDraw:
    """Every random decision of one crop; values that were not drawn are None."""

    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    jitter: tuple[tuple[str, float], ...]  # in the order of application
    grey: bool
    blur_sigma: float | None
    solarize: bool


@dataclass(frozen=True)
class CropRecipe:
    """What one kind of crop is drawn from."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    strength: float = 1.0  # of the colour jitter
    grey: float = 0.2

    def draw(self, height: int, width: int, rng: np.random.Generator) -> CropDraw:
        """Decide on a crop of an image of that size."""
        flip = rng.random() < self.flip
        order: list[tuple[str, float]] = []
        if rng.random() < self.jitter:
            s = self.strength
            factors = {
                "brightness": rng.uniform(1 - 0.4 * s, 1 + 0.4 * s),
                "contrast": rng.uniform(1 - 0.4 * s, 1 + 0.4 * s),
                "saturation": rng.uniform(1 - 0.2 * s, 1 + 0.2 * s),
                "hue": rng.uniform(-0.1 * s, 0.1 * s),
            }
            order = [(name, factors[name]) for name in rng.permutation(list(factors))]
        grey = rng.random() < self.grey
        sigma = float(rng.uniform(*BLUR_SIGMA)) if rng.random() < self.blur else None
        solarize = rng.random() < self.solarize
        box = random_box(height, width, self.scale, rng)
        return CropDraw(box, bool(flip), tuple(order), bool(grey), sigma, bool(solarize))


@dataclass(frozen=True)
class CentreRecipe(CropRecipe):
    """The square in the middle, without chance."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> CropDraw:
        """The same whatever is drawn."""
        side = min(height, width)
        return CropDraw(((height - side) // 2, (width - side) // 2, side, side), False, (), False, None, False)


def random_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """top, left, height, width of torchvision's RandomResizedCrop: area in `scale`, aspect 3/4 to 4/3."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1)), down, across
    ratio = width / height
    down, across = height, width
    if ratio < 3 / 4:
        down = round(width / (3 / 4))
    elif ratio > 4 / 3:
        across = round(height * 4 / 3)
    return (height - down) // 2, (width - across) // 2, down, across


class MultiCrop:
    """An image -> its global and local crops, normalised: a function of the seed, the epoch and the image's index."""

    def __init__(self, globals_: Sequence[CropRecipe], local: CropRecipe, num_local: int, seed: int) -> None:
        """`globals_`: one recipe for each global crop."""
        self.recipes = [*globals_, *[local] * num_local]
        self.seed = seed

    def draws(self, size: tuple[int, int], epoch: int, index: int) -> list[CropDraw]:
        """What each crop of this image is, this time."""
        rng = np.random.default_rng(stable_seed("crops", self.seed, epoch, index))
        return [recipe.draw(*size, rng) for recipe in self.recipes]

    def __call__(self, image: UInt8, epoch: int, index: int) -> list[Tensor]:
        """(H, W, 3) -> (3, size, size) for each crop."""
        draws = self.draws(image.shape[:2], epoch, index)
        return [cut(image, draw, recipe.size) for draw, recipe in zip(draws, self.recipes, strict=True)]


def cut(image: UInt8, draw: CropDraw, size: int) -> Tensor:
    """One crop as the published recipe makes it, step by step on 8 bits; (3, size, size), ImageNet-normalised."""
    picture = TF.resized_crop(
        Image.fromarray(image), *draw.box, [size, size], interpolation=TF.InterpolationMode.BICUBIC
    )
    if draw.flip:
        picture = TF.horizontal_flip(picture)
    for name, factor in draw.jitter:
        picture = getattr(TF, f"adjust_{name}")(picture, factor)
    if draw.grey:
        picture = TF.rgb_to_grayscale(picture, num_output_channels=3)
    if draw.blur_sigma is not None:
        picture = TF.gaussian_blur(picture, [BLUR_KERNEL, BLUR_KERNEL], [draw.blur_sigma, draw.blur_sigma])
    if draw.solarize:
        picture = TF.solarize(picture, SOLARIZE_THRESHOLD)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    return (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def published_crops(
    seed: int,
    global_size: int = 224,
    local_size: int = 98,
    num_local: int = 8,
    global_scale: Sequence[float] = (0.32, 1.0),
    local_scale: Sequence[float] = (0.05, 0.32),
    blur: str = "published",
    solarize: float = 0.2,
    strength: float = 1.0,
    patch_size: int = 14,
) -> MultiCrop:
    """DINOv2's recipe: two global crops, the second solarised with probability `solarize`, and `num_local` local ones.

    `blur`: `published` probabilities (1, 0.1, 0.5), or those that the `released` code really applied, because its
    transform passes 1 - p on: (0, 0.9, 0.5), or `none`.

    Raises:
        UserError: an unknown blur, or sizes that are no multiple of the patch.
    """
    if blur not in BLUR:
        raise unknown_name("blur", str(blur), BLUR)
    if global_size % patch_size or local_size % patch_size or min(global_size, local_size) < patch_size:
        raise UserError(
            f"Crops of {global_size} and {local_size} pixels; expected multiples of the patch size {patch_size}."
        )
    first, second, local = BLUR[blur]
    big = CropRecipe(global_size, _pair(global_scale), blur=first, strength=strength)
    return MultiCrop(
        [big, replace(big, blur=second, solarize=solarize)],
        CropRecipe(local_size, _pair(local_scale), blur=local, strength=strength),
        num_local,
        seed,
    )


def centre_crop(size: int) -> MultiCrop:
    """One view of each image, not augmented: its middle."""
    recipe = CentreRecipe(size, (1.0, 1.0), blur=0.0)
    return MultiCrop([recipe], recipe, 0, seed=0)


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    if not 0 < low <= high <= 1:
        raise UserError(f"A crop's scale is {list(values)}; expected two shares of the image's area, the lower first.")
    return float(low), float(high)
