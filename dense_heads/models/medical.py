"""A model that segments medical images and volumes."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
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
from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head
from dense_heads.models.card import Card
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, infer
from dense_heads.models.looks import mean
from dense_heads.ops.guided import guided
from dense_heads.ops.instances import Objects, largest_only
from dense_heads.ops.resize import resize
from dense_heads.structures import Size, View

SLICES_AT_ONCE = 8


@dataclass(frozen=True)
class Refine:
    """What is done to a prediction before it is measured or written.

    Args:
        guided_radius: pixels: probabilities follow the edges of their image by a guided filter; None: they do not.
        guided_eps: contrast (squared, of grey 0 to 1) below which it smooths.
        components: `all`, or `largest`: of each class of a whole case the largest connected part.

    Raises:
        UserError: values that make no sense.
    """

    guided_radius: int | None = None
    guided_eps: float = 0.01
    components: str = "all"

    def __post_init__(self) -> None:
        if self.components not in ("all", "largest"):
            raise unknown_name("task.refine.components:", str(self.components), ["all", "largest"])
        radius = self.guided_radius
        if radius is not None and not (isinstance(radius, int) and radius >= 1 and self.guided_eps > 0):
            raise UserError(
                f"task.refine: guided_radius={radius}, guided_eps={self.guided_eps}; expected a whole number from 1 on "
                "(null: no filter) and a number above 0."
            )

    def maps(self, maps: Sequence[Tensor], views: Sequence[Sequence[View]], multilabel: bool) -> list[Tensor]:
        """Probabilities (K, H, W) of images, refined.

        Raises:
            UserError: a filter is asked for, and the images are not here but their features.
        """
        if self.guided_radius is None:
            return list(maps)
        refined = []
        for map, own in zip(maps, views, strict=True):
            view = own[0]
            if not isinstance(view, Tensor):
                raise UserError(
                    "task.refine.guided_radius follows the images, and cache keeps features: set cache=off."
                )
            grey = resize(view.mean(dim=0)[None, None], (int(map.shape[-2]), int(map.shape[-1])))[0]
            grey = (grey - grey.min()) / (grey.max() - grey.min()).clamp(min=1e-6)
            filtered = guided(map, grey, self.guided_radius, self.guided_eps)
            refined.append(filtered if multilabel else filtered / filtered.sum(dim=0, keepdim=True).clamp(min=1e-6))
        return refined

    def labels(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """The labels of a whole case: class ids, or with several labels (K, ...) of 0 and 1."""
        if self.components == "all":
            return labels
        if labels.dtype == np.bool_:
            return np.stack([largest_only(label.astype(np.uint8), 2) > 0 for label in labels])
        return largest_only(labels, num_classes)


def probability_maps(
    backbone: FrozenBackbone,
    heads: Sequence[Head],
    views: Sequence[Sequence[View]],
    sizes: Sequence[Size],
    how: Inference,
    multilabel: bool = False,
    refine: Refine | None = None,
) -> list[list[Tensor]]:
    """For each head and image the probability of each class (K, H, W) at the image's size in `sizes`.

    They sum to 1 over the classes; with `multilabel` each label has its own.
    """

    def activate(logits: Tensor) -> Tensor:
        return logits.sigmoid() if multilabel else logits.softmax(dim=-3)

    finish = functools.partial(mean, activate=activate)
    found = infer(functools.partial(backbone.maps, heads=heads), views, sizes, how, finish)
    return found if refine is None else [refine.maps(maps, views, multilabel) for maps in found]


def decided(probabilities: Tensor, multilabel: bool) -> Tensor:
    """The most probable class of each pixel (H, W); with `multilabel` which labels it has (K, H, W), 0 or 1."""
    return (probabilities > 0.5).long() if multilabel else probabilities.argmax(dim=0)


class MedicalSegmentor(DenseModel):
    """Predicts class ids of an image (H, W) or of a volume (X, Y, Z) as stored; with several labels 0 and 1 (K, ...).

    Where single objects are told apart, they are predicted (H, W): 0 background, 1..n.

    `card.settings`: `multilabel`; for volumes `cut` (arguments of Cut) and `modalities`; `objects` (of Objects);
    `refine` (of Refine).
    """

    def __init__(self, backbone: FrozenBackbone, head: Head, card: Card) -> None:
        """As DenseModel."""
        super().__init__(backbone, head, card)
        settings = card.settings
        self.multilabel = bool(settings["multilabel"])
        self.modalities = tuple(settings.get("modalities", ()))
        self.objects = None if settings.get("objects") is None else Objects(**settings["objects"])
        self.refine = Refine(**settings.get("refine", {}))
        self.cut: Cut | None = None
        self.inputs: Inputs = Pictures()
        if settings.get("cut") is not None:
            self.cut = Cut(**{**settings["cut"], "intensity": Intensity(**settings["cut"]["intensity"])})
            self.inputs = Volumes(self.modalities)

    def decode(self, views: Sequence[View], size: Size) -> Tensor:
        """See the class."""
        labels = self._labels([views], [size])[0]
        return labels if self.objects is not None else self._whole(labels)

    def _labels(self, views: Sequence[Sequence[View]], sizes: Sequence[Size]) -> list[Tensor]:
        maps = probability_maps(self.backbone, [self.head], views, sizes, self.inference, self.multilabel, self.refine)[
            0
        ]
        if self.objects is not None:
            return [torch.from_numpy(self.objects.found(map.cpu().numpy())).long() for map in maps]
        return [decided(map, self.multilabel) for map in maps]

    def _whole(self, labels: Tensor) -> Tensor:
        """The labels of a whole case, refined."""
        array = labels.cpu().numpy()
        array = self.refine.labels(array > 0 if self.multilabel else array, self.card.num_outputs)
        return torch.from_numpy(array).long()

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
        labels = self._whole(torch.from_numpy(np.stack(planes, axis=-3))).numpy()
        if self.multilabel:
            return np.stack([stack.view.stored(label) for label in labels])
        return stack.view.stored(labels)
