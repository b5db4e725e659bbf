"""The words every room shares: batches, features, sizes.

Shapes: B batch, C channels, D embedding width, N patch tokens, R registers, H W pixels, h w patches, K classes,
L chosen blocks. Sizes are always (height, width); boxes are xyxy in pixels; depth is in metres.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, TypedDict

import torch
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


class Level(NamedTuple):
    """The output of one block (0-based), final norm applied or not, of an image seen whole or in windows as well.

    With `windows` = n > 1 the map is twice as wide: first of the image made small, then of its n x n windows, tiled.
    """

    block: int
    norm: bool
    windows: int = 1


class FeatureRequest(NamedTuple):
    """What a head wants from the backbone: which blocks (0-based, ascending), and of each what `Level` says."""

    blocks: tuple[int, ...]
    norm: bool
    windows: int = 1

    @property
    def levels(self) -> tuple[Level, ...]:
        """The same as levels."""
        return tuple(Level(block, self.norm, self.windows) for block in self.blocks)


@dataclass(frozen=True)
class Features:
    """What a head sees of an image batch: one patch map and one cls token for each chosen block."""

    patch_maps: tuple[Tensor, ...]  # L x (B, D, h, w)
    cls_tokens: tuple[Tensor, ...]  # L x (B, D)
    image_size: Size  # (H, W) before padding
    padding: Padding = NO_PADDING


@dataclass(frozen=True)
class Levels:
    """All that one pass of the backbone gave: each level that some head asked for, once."""

    patch_maps: Mapping[Level, Tensor]  # (B, D, h, w) each
    cls_tokens: Mapping[Level, Tensor]  # (B, D) each
    image_size: Size  # (H, W) before padding
    padding: Padding = NO_PADDING

    def features(self, request: FeatureRequest) -> Features:
        """What one head asked for."""
        return Features(
            patch_maps=tuple(self.patch_maps[level] for level in request.levels),
            cls_tokens=tuple(self.cls_tokens[level] for level in request.levels),
            image_size=self.image_size,
            padding=self.padding,
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""
        return type(self)(
            {level: change(tensor) for level, tensor in self.patch_maps.items()},
            {level: change(tensor) for level, tensor in self.cls_tokens.items()},
            self.image_size,
            self.padding,
        )

    def pooled(self) -> Self:
        """Each map's mean in its place, (B, D, 1, 1): all that heads on whole images see of it."""
        means = {level: map.float().mean((2, 3), keepdim=True) for level, map in self.patch_maps.items()}
        return type(self)(means, self.cls_tokens, self.image_size, self.padding)

    def float(self) -> Self:
        """In float32, which heads compute in."""
        return self.map(Tensor.float)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """On another device: Lightning moves a batch's parts by this name."""
        return self.map(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """In page-locked memory: loaders call this name."""
        return self.map(Tensor.pin_memory)

    @classmethod
    def cat(cls, parts: Sequence["Levels"]) -> "Levels":
        """Several batches of one image size as one."""
        first = parts[0]
        assert all((part.image_size, part.padding) == (first.image_size, first.padding) for part in parts)
        return cls(
            {level: torch.cat([part.patch_maps[level] for part in parts]) for level in first.patch_maps},
            {level: torch.cat([part.cls_tokens[level] for part in parts]) for level in first.cls_tokens},
            first.image_size,
            first.padding,
        )


@dataclass(frozen=True)
class SeenView:
    """A test view that has been through the backbone: what the feature cache gives in place of its pixels."""

    size: Size  # (H, W) of the view
    windows: Sequence[Levels]  # one image each, in the order in which `models/inference.py` looks at them

    def to(self, *args: Any, **kwargs: Any) -> "SeenView":
        """On another device: Lightning moves a batch's parts by this name."""
        return SeenView(self.size, [window.to(*args, **kwargs) for window in self.windows])

    def pin_memory(self) -> "SeenView":
        """In page-locked memory: loaders call this name."""
        return SeenView(self.size, [window.pin_memory() for window in self.windows])


View = Tensor | SeenView  # (C, H, W) normalised pixels, or their features


Detection = dict[str, Tensor]  # of one image: boxes (n, 4) xyxy pixels, scores (n,), labels (n,); masks (n, M, M)


class Batch(TypedDict, total=False):
    """One batch of any task; each task fills the keys that it has.

    In training `image` and the labels are tensors. In validation, test and prediction they may be lists with one
    tensor per image, the labels at their own size. With several test scales `views` stands in place of `image`.
    """

    image: Tensor | list[Tensor]  # (B, C, H, W) float32, ImageNet-normalised
    views: list[list[View]]  # for each image its test scales, each (C, H, W); cached features stand here too
    crops: list[Tensor]  # self-supervised: (2B, C, H, W) global crops, view by view; then local ones, if any
    patch_masks: Tensor  # (2B, N) bool, patches of the global crops that are hidden from the student
    features: Levels  # in training, in place of `image` where features come from the cache
    mask: Tensor | list[Tensor]  # (B, H, W) int64, IGNORE_INDEX where nothing is known
    multilabel: Tensor | list[Tensor]  # (B, K, H, W) int64 of 0, 1 and IGNORE_INDEX: labels that overlap
    instances: list[Tensor]  # per image (H, W) int32, 0 background, 1..n objects
    depth_m: Tensor | list[Tensor]  # (B, H, W) float32 metres, 0 = no measurement
    boxes: list[Tensor]  # per image (n, 4) xyxy pixels
    labels: list[Tensor]  # per image (n,) int64
    instance_masks: list[Tensor]  # per image (n, H, W) bool
    iscrowd: list[Tensor]  # per image (n,) bool
    difficult: list[Tensor]  # per image (n,) bool
    area: list[Tensor]  # per image (n,) float64 pixels, as annotated
    mask_codes: list[tuple[str, ...]]  # per image the run-length codes of its n masks, at the image's own size
    coco_id: list[int]  # of the images, in COCO files
    class_id: Tensor  # (B,)
    size: Tensor  # (B, 2) of the image as the model sees it
    original_size: Tensor  # (B, 2) of the image on disk
    intrinsics: Tensor  # (B, 3, 3)
    image_id: list[str]
    path: list[str]
    case_id: list[str]
    slice_index: list[int]
    num_slices: list[int]  # of the case; 1 for an image
    spacing: Tensor  # (B, 3) mm between slices, rows, columns
    affine: Tensor
