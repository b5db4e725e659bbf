"""A simple feature pyramid over the one resolution of a plain ViT, and anchors and pooling that know its strides.

ViTDet (Li et al., ECCV 2022, section 3): every level is made from the same map, by transposed and strided convolutions;
there is no top-down path. Strides are those of a patch of 14 pixels: 7, 14, 28, 56.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from dense_heads.errors import UserError
from dense_heads.heads.detection import PATCH_SIZE
from dense_heads.structures import Features

STRIDES = (PATCH_SIZE // 2, PATCH_SIZE, 2 * PATCH_SIZE, 4 * PATCH_SIZE)


class SimplePyramid(nn.Module):
    """Patch maps -> maps of equal width at several strides.

    The chosen blocks' maps are concatenated and projected; from there each level has its own way up or down.

    Args:
        in_channels: width of each chosen block's map.
        channels: width of all levels.
        strides: pixels, neighbours among 7, 14, 28, 56. The finest is the dearest.

    Raises:
        UserError: other strides.
    """

    def __init__(self, in_channels: Sequence[int], channels: int = 128, strides: Sequence[int] = STRIDES) -> None:
        super().__init__()
        runs = [STRIDES[first:last] for first in range(len(STRIDES)) for last in range(first + 1, len(STRIDES) + 1)]
        if tuple(strides) not in runs:
            raise UserError(f"strides {list(strides)}; expected neighbours among {list(STRIDES)}, ascending.")
        self.strides = tuple(int(stride) for stride in strides)
        self.out_channels = channels  # torchvision's detectors ask for it by this name
        self.project = nn.Sequential(nn.Conv2d(sum(in_channels), channels, 1), LayerNorm2d(channels, eps=1e-6))
        ways: dict[int, list[nn.Module]] = {
            STRIDES[0]: [nn.ConvTranspose2d(channels, channels, 2, stride=2)],
            STRIDES[1]: [],
            STRIDES[2]: [nn.Conv2d(channels, channels, 2, stride=2)],
            STRIDES[3]: [
                *(nn.Conv2d(channels, channels, 2, stride=2), LayerNorm2d(channels, eps=1e-6), nn.GELU()),
                nn.Conv2d(channels, channels, 2, stride=2),
            ],
        }
        self.levels = nn.ModuleList(
            nn.Sequential(
                *ways[stride],
                *([LayerNorm2d(channels, eps=1e-6), nn.GELU()] if ways[stride] else []),
                nn.Conv2d(channels, channels, 3, padding=1),
                LayerNorm2d(channels, eps=1e-6),
            )
            for stride in self.strides
        )

    def forward(self, features: Features) -> "OrderedDict[str, Tensor]":
        """Maps (B, channels, h, w) by level number; the grid is filled up with zeros to a multiple of 56 pixels."""
        x = torch.cat(features.patch_maps, dim=1)
        rows, columns = x.shape[-2:]
        x = F.pad(self.project(x), (0, -columns % 4, 0, -rows % 4))
        return OrderedDict((str(number), level(x)) for number, level in enumerate(self.levels))


class PyramidAnchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors with explicit strides, centred on their cells and not rounded.

    torchvision derives strides from sizes by whole division, places anchors at the corners of cells, and rounds their
    halves, which turns 7 pixels into 8.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], strides: Sequence[int]) -> None:
        """`sizes`: sides of square anchors in pixels, for each level; `ratios`: height / width; `strides`: pixels."""
        super().__init__(tuple(tuple(level) for level in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - as torchvision has it
    ) -> Tensor:
        """(n, 4) anchors around 0, n = ratios x sizes."""
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (sides / roots[:, None]).flatten(), (sides * roots[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """For each image the anchors (n, 4) of all levels, in the pixels of the patch grid."""
        like = feature_maps[0]
        self.set_cell_anchors(like.dtype, like.device)
        steps = [[torch.tensor(stride, device=like.device)] * 2 for stride in self.strides]
        levels = self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], steps)
        centred = torch.cat([level + stride / 2 for level, stride in zip(levels, self.strides, strict=True)])
        return [centred] * len(image_list.image_sizes)


class PyramidRoIAlign(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign over the pyramid with its true scales, 1/7, 1/14, ..., and half-pixel centres.

    torchvision's pooler rounds scales to powers of two (1/7 becomes 1/8) and samples half a cell away from where a
    value stands. Boxes choose their level as in FPN (eq. 1): one of 392 pixels, 14 cells of stride 28, stands there.
    """

    def __init__(self, output_size: int, strides: Sequence[int], sampling_ratio: int = 2) -> None:
        """`output_size`: cells of a side; `strides`: pixels; `sampling_ratio`: samples for each cell and direction."""
        super().__init__([str(number) for number in range(len(strides))], output_size, sampling_ratio)
        self.strides = tuple(strides)
        self.mapper = LevelMapper(
            STRIDES.index(self.strides[0]), STRIDES.index(self.strides[-1]), canonical_scale=392, canonical_level=2
        )

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """(n, C, output_size, output_size) for the n boxes of all images, in their order."""
        maps = list(x.values())
        images = torch.cat([torch.full_like(some[:, :1], number) for number, some in enumerate(boxes)])
        rois = torch.cat([images, torch.cat(boxes)], dim=1)
        pooled = maps[0].new_zeros((len(rois), maps[0].shape[1], *self.output_size))
        levels = self.mapper(boxes)
        for number, (level, stride) in enumerate(zip(maps, self.strides, strict=True)):
            here = torch.where(levels == number)[0]
            pooled[here] = roi_align(
                level, rois[here], self.output_size, 1 / stride, self.sampling_ratio, aligned=True
            ).to(pooled.dtype)
        return pooled
