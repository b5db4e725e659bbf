"""A model that names the one class of a whole image."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dense_heads.data.classification_transforms import CentreEvalTransform
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.heads.classification import ClassificationHead
from dense_heads.models.card import Card
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, crop, together, view_size
from dense_heads.structures import Levels, SeenView, Size, View


def class_probabilities(
    backbone: FrozenBackbone, heads: Sequence[Head], views: Sequence[Sequence[View]], how: Inference
) -> list[Tensor]:
    """For each head the probabilities (B, K) of each image's classes, mean over its views, windows and mirror images.

    Looks of equal size share a pass, whichever image they come from.
    """
    requests = [backbone.request(head) for head in heads]
    waiting: dict[Size, list[tuple[int, Tensor | Levels]]] = {}
    found: list[list[list[Tensor]]] = [[[] for _ in views] for _ in heads]

    def forward(group: list[tuple[int, Tensor | Levels]]) -> None:
        seen = together([content for _, content in group])
        levels = (seen if isinstance(seen, Levels) else backbone(seen, requests)).float()
        for own, head, request in zip(found, heads, requests, strict=True):
            for (image, _), scores in zip(group, head(levels.features(request)), strict=True):
                own[image].append(scores.float().softmax(dim=0))

    for image, image_views in enumerate(views):
        for view in image_views:
            for number, (box, flip) in enumerate(how.windows(view_size(view))):
                content = view.windows[number] if isinstance(view, SeenView) else crop(view, box, flip)
                size = (box[2] - box[0], box[3] - box[1])
                waiting.setdefault(size, []).append((image, content))
                if len(waiting[size]) == how.window_batch:
                    forward(waiting.pop(size))
    for group in waiting.values():
        forward(group)
    return [torch.stack([torch.stack(looks).mean(dim=0) for looks in images]) for images in found]


class Classifier(DenseModel):
    """Predicts the probability of each class (K,); called on a batch it gives scores (B, K)."""

    transform_type = CentreEvalTransform
    pooled = True

    def __init__(self, backbone: FrozenBackbone, head: Head, card: Card) -> None:
        if not isinstance(head, ClassificationHead):
            raise UserError(f"{type(head).__name__} predicts maps; expected a head that names an image's class.")
        super().__init__(backbone, head, card)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) normalised -> (B, K)."""
        request = self.backbone.request(self.head)
        scores: Tensor = self.head(self.backbone(images, [request]).float().features(request))
        return scores

    def decode(self, views: Sequence[View], size: Size) -> Tensor:
        """The probabilities (K,) of one image's classes, from its normalised test views."""
        return class_probabilities(self.backbone, [self.head], [views], self.inference)[0][0]
