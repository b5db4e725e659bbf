"""A model that segments medical images and volumes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dense_heads.data.inputs import Inputs, Pictures
from dense_heads.data.intensity import Intensity
from dense_heads.data.slices import Cut, read_volume
from dense_heads.data.volume_inputs import Volumes
from dense_heads.data.volumes import Volume
from dense_heads.heads.base import Head
from dense_heads.models.card import Card
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, infer
from dense_heads.ops.instances import Objects
from dense_heads.structures import Levels, Size, View

SLICES_AT_ONCE = 8


def probability_maps(
    backbone: FrozenBackbone,
    heads: Sequence[Head],
    views: Sequence[Sequence[View]],
    sizes: Sequence[Size],
    how: Inference,
    multilabel: bool = False,
) -> list[list[Tensor]]:
    """For each head and image the probability of each class (K, H, W) at the image's size in `sizes`.

    They sum to 1 over the classes; with `multilabel` each label has its own.
    """

    def predict(seen: Tensor | Levels) -> list[Tensor]:
        return [logits.float() for logits in backbone.predict_all(seen, heads)]

    def activate(logits: Tensor) -> Tensor:
        return logits.sigmoid() if multilabel else logits.softmax(dim=-3)

    return infer(predict, views, sizes, how, activate)


def decided(probabilities: Tensor, multilabel: bool) -> Tensor:
    """The most probable class of each pixel (H, W); with `multilabel` which labels it has (K, H, W), 0 or 1."""
    return (probabilities > 0.5).long() if multilabel else probabilities.argmax(dim=0)


class MedicalSegmentor(DenseModel):
    """Predicts class ids of an image (H, W) or of a volume (X, Y, Z) as stored; with several labels 0 and 1 (K, ...).

    Where single objects are told apart, they are predicted (H, W): 0 background, 1..n.

    `card.settings`: `multilabel`; for volumes `cut` (arguments of Cut) and `modalities`; `objects` (of Objects).
    """

    def __init__(self, backbone: FrozenBackbone, head: Head, card: Card) -> None:
        """As DenseModel."""
        super().__init__(backbone, head, card)
        settings = card.settings
        self.multilabel = bool(settings["multilabel"])
        self.modalities = tuple(settings.get("modalities", ()))
        self.objects = None if settings.get("objects") is None else Objects(**settings["objects"])
        self.cut: Cut | None = None
        self.inputs: Inputs = Pictures()
        if settings.get("cut") is not None:
            self.cut = Cut(**{**settings["cut"], "intensity": Intensity(**settings["cut"]["intensity"])})
            self.inputs = Volumes(self.modalities)

    def decode(self, views: Sequence[View], size: Size) -> Tensor:
        """See the class."""
        return self._labels([views], [size])[0]

    def _labels(self, views: Sequence[Sequence[View]], sizes: Sequence[Size]) -> list[Tensor]:
        maps = probability_maps(self.backbone, [self.head], views, sizes, self.inference, self.multilabel)[0]
        if self.objects is not None:
            return [torch.from_numpy(self.objects.found(map.cpu().numpy())).long() for map in maps]
        return [decided(map, self.multilabel) for map in maps]

    @torch.inference_mode()
    def predict(self, image: Any) -> np.ndarray:
        """The labels of an image, or of a volume in the axes of its file.

        `image`: as DenseModel; of volumes the path of a NIfTI file or of a folder with a DICOM series, or a Volume.

        Raises:
            UserError: it cannot be read, or its channels are not those of the model.
        """
        if self.cut is None:
            return super().predict(image)
        volume = image if isinstance(image, Volume) else read_volume(Path(image))
        if self.modalities and not volume.modalities:
            volume = Volume(volume.values, volume.affine, self.modalities, volume.header)
        stack = self.cut.stack(volume)
        size = int(stack.grey.shape[2]), int(stack.grey.shape[3])
        planes: list[np.ndarray] = []
        for start in range(0, len(stack), SLICES_AT_ONCE):
            chosen = range(start, min(start + SLICES_AT_ONCE, len(stack)))
            views = [[view.to(self.device) for view in self.transform(self.cut.image(stack, i))] for i in chosen]
            planes += [labels.cpu().numpy() for labels in self._labels(views, [size] * len(views))]
        labels = np.stack(planes, axis=-3)
        if self.multilabel:
            return np.stack([stack.view.stored(label) for label in labels])
        return stack.view.stored(labels)
