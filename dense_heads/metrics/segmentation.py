"""Scores of semantic segmentation, all from one confusion matrix over the data set."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dense_heads.errors import UserError
from dense_heads.structures import IGNORE_INDEX

CONVENTIONS = (
    "One confusion matrix is summed over all pixels of all images of the split, at the label's own size (not a mean "
    "over images). Pixels labelled 255 count neither as label nor as prediction. For each class, with I pixels right, "
    "L labelled and P predicted: IoU = I / (P + L - I), accuracy = I / L, Dice = 2 I / (P + L). mIoU, mAcc and mean "
    "Dice are unweighted means over classes; a class that occurs neither in labels nor in predictions is nan and left "
    "out of the means, a class that is predicted but never labelled counts with IoU 0 and Dice 0 and has no accuracy. "
    "aAcc is the share of right pixels. Scores run from 0 to 1."
)


class ConfusionMatrix(Metric):
    """Pixels by label (row) and prediction (column), summed over a data set and over processes.

    Exact: int64 throughout, whatever the precision of the run.
    """

    full_state_update = False
    matrix: Tensor

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        """`ignore_index`: the label that counts nowhere; it cannot be a class.

        Raises:
            UserError: fewer than two classes, or so many that `ignore_index` would be one.
        """
        super().__init__()
        if not 2 <= num_classes <= ignore_index:
            raise UserError(
                f"Got {num_classes} classes with the ignore label {ignore_index}; expected 2 to {ignore_index}, "
                "numbered from 0. Merge classes with task.data.labels.map."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.add_state("matrix", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count an image or a batch.

        Args:
            pred: class of each pixel, integers of any shape, usually (H, W).
            target: label of each pixel, the same shape.

        Raises:
            UserError: a label that is neither a class nor `ignore_index`.
        """
        assert pred.shape == target.shape, f"prediction {tuple(pred.shape)}, label {tuple(target.shape)}"
        assert not pred.is_floating_point() and not target.is_floating_point(), (pred.dtype, target.dtype)
        valid = target != self.ignore_index
        pred, target = pred[valid].long(), target[valid].long()
        if target.numel() == 0:
            return
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(
                f"Got labels from {low} to {high}; expected 0 to {self.num_classes - 1}, or {self.ignore_index} where "
                "nothing is known. Set task.num_classes, or translate the labels with task.data.labels.map."
            )
        assert 0 <= int(pred.min()) and int(pred.max()) < self.num_classes, "a prediction is no class"
        pairs = target * self.num_classes + pred
        self.matrix += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.matrix)

    def compute(self) -> Tensor:
        """(K, K) int64, labels in rows."""
        return self.matrix


SCORES = ("miou", "macc", "aacc", "dice")


def scores(matrix: Tensor) -> dict[str, float]:
    """`miou`, `macc`, `aacc` and mean `dice` of a confusion matrix, by `CONVENTIONS`; nan where there is no pixel.

    Args:
        matrix: (K, K) integers, labels in rows, predictions in columns.
    """
    right, labelled, predicted = _counts(matrix)
    dice = 2 * right.double() / (labelled + predicted).double()
    return {
        "miou": _iou(right, labelled, predicted).nanmean().item(),
        "macc": (right.double() / labelled.double()).nanmean().item(),
        "aacc": (right.sum().double() / labelled.sum().double()).item(),
        "dice": dice.nanmean().item(),
    }


def per_class(matrix: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """For each class its `name`, `iou` and `acc`, by `CONVENTIONS`; nan where the class is absent."""
    right, labelled, predicted = _counts(matrix)
    assert len(class_names) == len(right), f"{len(class_names)} names for {len(right)} classes"
    ious, accs = _iou(right, labelled, predicted).tolist(), (right.double() / labelled.double()).tolist()
    return [{"name": name, "iou": iou, "acc": acc} for name, iou, acc in zip(class_names, ious, accs, strict=True)]


def _counts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Right, labelled and predicted pixels of each class: integers, so nothing is rounded before a division."""
    matrix = matrix.cpu()  # float64, which the divisions need, does not exist on every device
    return matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)


def _iou(right: Tensor, labelled: Tensor, predicted: Tensor) -> Tensor:
    # 0 / 0 is nan, which the means leave out.
    return right.double() / (labelled + predicted - right).double()
