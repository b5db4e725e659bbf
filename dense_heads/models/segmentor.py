"""A model that labels every pixel."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense_heads.data.images import read_image, to_uint8
from dense_heads.data.transforms import EvalTransform
from dense_heads.heads.base import Head
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, infer
from dense_heads.structures import Size


def label_maps(
    backbone: FrozenBackbone,
    heads: Sequence[Head],
    views: Sequence[Sequence[Tensor]],
    sizes: Sequence[Size],
    how: Inference,
) -> list[list[Tensor]]:
    """For each head and image the most probable class of each pixel, (H, W) int64 at the image's size in `sizes`."""

    def predict(images: Tensor) -> list[Tensor]:
        return [logits.float() for logits in backbone.predict_all(images, heads)]

    probabilities = infer(predict, views, sizes, how, activate=lambda logits: logits.softmax(dim=-3))
    return [[image.argmax(dim=0) for image in images] for images in probabilities]


class Segmentor(DenseModel):
    """Frozen backbone + segmentation head + the preprocessing that it was measured with."""

    def __init__(
        self,
        backbone: FrozenBackbone,
        head: Head,
        transform: EvalTransform,
        inference: Inference,
        classes: Sequence[str],
    ) -> None:
        """`classes`: names in the order of the predicted ids."""
        super().__init__(backbone, head)
        self.transform = transform
        self.inference = inference
        self.classes = list(classes)

    @torch.inference_mode()
    def predict(self, image: Any) -> np.ndarray:
        """Class ids (H, W) int64 at the image's own size.

        `image`: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W).

        Raises:
            UserError: the image cannot be read.
        """
        pixels = read_image(image) if isinstance(image, str | Path) else to_uint8(image)
        device = next(self.head.parameters()).device
        views = [[view.to(device) for view in self.transform(pixels)]]
        size = (int(pixels.shape[0]), int(pixels.shape[1]))
        labels: np.ndarray = label_maps(self.backbone, [self.head], views, [size], self.inference)[0][0].cpu().numpy()
        return labels
