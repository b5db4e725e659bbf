"""A model that labels every pixel."""

import functools
from collections.abc import Sequence

from torch import Tensor

from dense_heads.heads.base import Head
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, infer
from dense_heads.models.looks import most_probable
from dense_heads.structures import Size, View


def label_maps(
    backbone: FrozenBackbone,
    heads: Sequence[Head],
    views: Sequence[Sequence[View]],
    sizes: Sequence[Size],
    how: Inference,
) -> list[list[Tensor]]:
    """For each head and image the most probable class of each pixel, (H, W) int64 at the image's size in `sizes`."""
    return infer(functools.partial(backbone.maps, heads=heads), views, sizes, how, most_probable)


class Segmentor(DenseModel):
    """Predicts class ids (H, W) int64; called on a batch it gives logits (B, K, H, W)."""

    def decode(self, views: Sequence[View], size: Size) -> Tensor:
        """The most probable class of each pixel."""
        return label_maps(self.backbone, [self.head], [views], [size], self.inference)[0][0]
