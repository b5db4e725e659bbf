"""A model that measures depth."""

import functools
from collections.abc import Sequence

from torch import Tensor

from dense_heads.data.depth_transforms import DepthEvalTransform
from dense_heads.heads.base import Head
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, infer
from dense_heads.models.looks import mean
from dense_heads.structures import Size, View


def depth_maps(
    backbone: FrozenBackbone,
    heads: Sequence[Head],
    views: Sequence[Sequence[View]],
    sizes: Sequence[Size],
    how: Inference,
) -> list[list[Tensor]]:
    """For each head and image its depth (H, W) float32 in metres at the image's size in `sizes`.

    Flips are averaged as depths, windows before they are resized.
    """
    depths = infer(functools.partial(backbone.maps, heads=heads), views, sizes, how, mean)
    return [[image[0] for image in images] for images in depths]


class Depther(DenseModel):
    """Predicts metres (H, W) float32; called on a batch it gives `depth_m` (B, H, W)."""

    transform_type = DepthEvalTransform

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> metres (B, H, W) at the batch's own size."""
        return super().forward(images)[:, 0]

    def decode(self, views: Sequence[View], size: Size) -> Tensor:
        """Metres of each pixel."""
        return depth_maps(self.backbone, [self.head], [views], [size], self.inference)[0][0]
