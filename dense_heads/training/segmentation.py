"""Semantic segmentation: the loss at label resolution, one confusion matrix over the data set."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dense_heads.losses.segmentation import SegmentationLoss
from dense_heads.metrics.segmentation import SCORES, ConfusionMatrix, per_class, scores
from dense_heads.models.inference import Inference
from dense_heads.models.segmentor import label_maps
from dense_heads.ops.pad import Placement
from dense_heads.structures import Batch, Features, Size, View
from dense_heads.training.base import Candidate, DenseModule


class LabelModule(DenseModule):
    """What is the same wherever pixels get labels: how images are looked at, and the loss at label resolution."""

    def __init__(self, *args: Any, inference: Inference, class_names: Sequence[str], **kwargs: Any) -> None:
        """`inference`: windows and flips of validation and test; `class_names`: of all outputs."""
        super().__init__(*args, **kwargs)
        self.inference = inference
        self.class_names = list(class_names)

    def loss(self, candidate: Candidate, output: Tensor, features: Features, batch: Batch) -> Tensor:
        """The candidate's loss on logits brought to label resolution."""
        mask = self.labels(batch)
        assert isinstance(mask, Tensor)
        placement = self.backbone.placement(features)
        loss = _loss_of_map(candidate.loss, output, mask, placement)
        for weight, map in candidate.head.auxiliary:
            loss = loss + weight * _loss_of_map(candidate.loss, map, mask, placement)
        return loss

    def labels(self, batch: Batch) -> Tensor | list[Tensor]:
        """Class ids (B, H, W), or where labels overlap (B, K, H, W)."""
        return batch["mask"] if "mask" in batch else batch["multilabel"]

    def looks(self, batch: Batch) -> tuple[Sequence[Sequence[View]], list[Size]]:
        """For each image its views, and its label's own size."""
        views = batch.get("views") or [[image] for image in batch["image"]]
        return views, [(int(mask.shape[-2]), int(mask.shape[-1])) for mask in self.labels(batch)]


def _loss_of_map(loss: nn.Module, map: Tensor, mask: Tensor, placement: Placement) -> Tensor:
    """The loss of a head's map, without full-size logits where the loss can do without."""
    if isinstance(loss, SegmentationLoss):
        return loss.of_map(map, mask, placement)
    value: Tensor = loss(placement.enlarge(map.float()), mask)
    return value


class SegmentationModule(LabelModule):
    """Trains and measures segmentation heads on a frozen backbone."""

    metric_names = SCORES

    def __init__(self, *args: Any, num_classes: int, **kwargs: Any) -> None:
        """As LabelModule."""
        super().__init__(*args, **kwargs)
        self.confusion = nn.ModuleList(ConfusionMatrix(num_classes) for _ in self.candidates)

    def predict(self, batch: Batch) -> list[list[Tensor]]:
        """Label maps (H, W) int64, each at its label's own size."""
        heads = [candidate.head for candidate in self.candidates]
        return label_maps(self.backbone, heads, *self.looks(batch), self.inference)

    def reset_metrics(self) -> None:
        """Empty confusion matrices."""
        for confusion in self.confusion:
            confusion.reset()  # type: ignore[operator]

    def count(self, predictions: list[list[Tensor]], batch: Batch) -> None:
        """Add to each candidate's confusion matrix."""
        for confusion, maps in zip(self.confusion, predictions, strict=True):
            for prediction, mask in zip(maps, batch["mask"], strict=True):
                confusion.update(prediction, mask)  # type: ignore[operator]

    def measure(self) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
        """mIoU, mAcc, aAcc, mean Dice and the per-class table of each candidate."""
        matrices: list[Tensor] = [confusion.compute() for confusion in self.confusion]  # type: ignore[operator]
        return [scores(matrix) for matrix in matrices], [per_class(matrix, self.class_names) for matrix in matrices]
