"""A model that labels every pixel."""

from collections.abc import Sequence

from torch import Tensor

from dense_heads.heads.base import Head
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, infer
from dense_heads.structures import Levels, Size, View


def label_maps(
    backbone: FrozenBackbone,
    heads: Sequence[Head],
    views: Sequence[Sequence[View]],
    sizes: Sequence[Size],
    how: Inference,
) -> list[list[Tensor]]:
    """For each head and image the most probable class of each pixel, (H, W) int64 at the image's size in `sizes`."""

    def predict(seen: Tensor | Levels) -> list[Tensor]:
        return [logits.float() for logits in backbone.predict_all(seen, heads)]

    probabilities = infer(predict, views, sizes, how, activate=lambda logits: logits.softmax(dim=-3))
    return [[image.argmax(dim=0) for image in images] for images in probabilities]


class Segmentor(DenseModel):
    """Predicts class ids (H, W) int64; called on a batch it gives logits (B, K, H, W)."""

    def decode(self, views: Sequence[View], size: Size) -> Tensor:
        """The most probable class of each pixel."""
        return label_maps(self.backbone, [self.head], [views], [size], self.inference)[0][0]
