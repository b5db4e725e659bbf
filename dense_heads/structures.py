"""The words every room shares: batches, features, sizes.

Shapes: B batch, C channels, D embedding width, N patch tokens, R registers, H W pixels, h w patches, K classes,
L chosen blocks. Sizes are always (height, width); boxes are xyxy in pixels; depth is in metres.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from torch import Tensor

IGNORE_INDEX = 255  # the label of pixels that count nowhere: not in a loss, not in a metric
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB, on the 0-255 scale
IMAGENET_STD = (58.395, 57.12, 57.375)

Size = tuple[int, int]


class Padding(NamedTuple):
    """Pixels added on each side of an image to reach a multiple of the patch size."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0


NO_PADDING = Padding()


class FeatureRequest(NamedTuple):
    """What a head wants from the backbone: which blocks (0-based, ascending), final norm applied or not."""

    blocks: tuple[int, ...]
    norm: bool


@dataclass(frozen=True)
class Features:
    """What a head sees of an image batch: one patch map and one cls token for each chosen block."""

    patch_maps: tuple[Tensor, ...]  # L x (B, D, h, w)
    cls_tokens: tuple[Tensor, ...]  # L x (B, D)
    image_size: Size  # (H, W) before padding
    padding: Padding = NO_PADDING


class Batch(TypedDict, total=False):
    """One batch of any task; each task fills the keys that it has.

    In training `image` and the labels are tensors. In validation, test and prediction they may be lists with one
    tensor per image, the labels at their own size. With several test scales `views` stands in place of `image`.
    """

    image: Tensor | list[Tensor]  # (B, C, H, W) float32, ImageNet-normalised
    views: list[list[Tensor]]  # for each image its test scales, each (C, H, W)
    features: Features  # in place of `image` where features come from the cache
    mask: Tensor | list[Tensor]  # (B, H, W) int64, IGNORE_INDEX where nothing is known
    multilabel: Tensor  # (B, K, H, W)
    depth_m: Tensor | list[Tensor]  # (B, H, W) float32 metres, 0 = no measurement
    boxes: list[Tensor]  # per image (n, 4) xyxy pixels
    labels: list[Tensor]  # per image (n,) int64
    instance_masks: list[Tensor]  # per image (n, H, W) bool
    iscrowd: list[Tensor]
    area: list[Tensor]
    class_id: Tensor  # (B,)
    size: Tensor  # (B, 2) of the image as the model sees it
    original_size: Tensor  # (B, 2) of the image on disk
    intrinsics: Tensor  # (B, 3, 3)
    image_id: list[str]
    path: list[str]
    case_id: list[str]
    slice_index: list[int]
    spacing: Tensor
    affine: Tensor
