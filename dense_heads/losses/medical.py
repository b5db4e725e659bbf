"""The loss of medical segmentation: for small structures, for classes one or several to a pixel."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.errors import UserError
from dense_heads.losses.segmentation import SegmentationLoss
from dense_heads.losses.weights import checked_weights, is_number
from dense_heads.structures import IGNORE_INDEX


class MedicalLoss(nn.Module):
    """Weighted sum of losses over the pixels that have a label.

    Cross-entropy (divided by the labelled pixels), focal and Lovasz are those of SegmentationLoss; all but
    cross-entropy come from segmentation_models_pytorch. Dice comes in two forms that differ wherever images differ in
    how much they hold: `dice_per_batch` sums a class's pixels over the batch before it divides, `dice_per_image`
    measures every image by itself and takes the mean, so that a small lesion weighs as much as a large one; both are
    means over all classes, of which one that is absent counts 0. Tversky is over the batch, with `tversky_alpha` on
    false positives and `tversky_beta` on false negatives.

    With `multilabel` every label is told from its absence by itself (binary cross-entropy in place of cross-entropy).

    Args:
        cross_entropy: weight of cross-entropy.
        dice_per_batch: weight of the Dice loss over the batch.
        dice_per_image: weight of the mean of the images' Dice losses.
        focal: weight of the focal loss (gamma 2).
        lovasz: weight of the Lovasz loss.
        tversky: weight of the Tversky loss.
        tversky_alpha: weight of false positives in it.
        tversky_beta: weight of false negatives in it; above alpha, what is missed costs more.
        class_weights: for each class its weight in cross-entropy; None weighs all alike.
        label_smoothing: share of cross-entropy's target that is spread over all classes, 0 to 1.
        multilabel: labels overlap: targets are (B, K, H, W) of 0, 1 and 255.

    Raises:
        UserError: weights that are negative, not finite or all 0; what SegmentationLoss refuses.
    """

    def __init__(
        self,
        cross_entropy: float = 1.0,
        dice_per_batch: float = 1.0,
        dice_per_image: float = 0.0,
        focal: float = 0.0,
        lovasz: float = 0.0,
        tversky: float = 0.0,
        tversky_alpha: float = 0.3,
        tversky_beta: float = 0.7,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        multilabel: bool = False,
    ) -> None:
        super().__init__()
        weights = {"cross_entropy": cross_entropy, "dice_per_batch": dice_per_batch, "dice_per_image": dice_per_image}
        weights |= {"focal": focal, "lovasz": lovasz, "tversky": tversky}
        self.weights = {name: value for name, value in checked_weights(weights, "task.loss").items() if value > 0}
        if not (is_number(label_smoothing) and 0 <= label_smoothing <= 1):
            raise UserError(f"task.loss.label_smoothing={label_smoothing!r}: expected a number from 0 to 1.")
        for name, value in (("tversky_alpha", tversky_alpha), ("tversky_beta", tversky_beta)):
            if not (is_number(value) and value >= 0):
                raise UserError(f"task.loss.{name}={value!r}: expected a number, 0 or above.")
        if class_weights is not None and "cross_entropy" not in self.weights:
            raise UserError(
                "task.loss.class_weights is set while task.loss.cross_entropy is 0: class weights act on cross-entropy "
                "only. Give cross_entropy a weight, or leave class_weights out."
            )
        self.multilabel, self.label_smoothing = multilabel, float(label_smoothing)
        self.cross_entropy: SegmentationLoss | None = None
        if "cross_entropy" in self.weights and not multilabel:
            self.cross_entropy = SegmentationLoss(
                class_weights=class_weights, avg_non_ignore=True, label_smoothing=label_smoothing
            )
        self.register_buffer(
            "label_weights", torch.tensor(class_weights) if multilabel and class_weights else None, persistent=False
        )
        self.regions = nn.ModuleDict(_regions(tuple(self.weights), multilabel, tversky_alpha, tversky_beta))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B, K, H, W), at the label's size.
            target: (B, H, W) int64, with `multilabel` (B, K, H, W); 255 where there is no label.

        Returns:
            Scalar, float32; 0 with gradients of 0 where nothing is labelled.
        """
        assert logits.shape[:1] + logits.shape[-2:] == target.shape[:1] + target.shape[-2:], (
            logits.shape,
            target.shape,
        )
        logits = logits.float()
        loss = logits[:0].sum()
        if not bool((target != IGNORE_INDEX).any()):
            return loss
        for name, weight in self.weights.items():
            loss = loss + weight * self._one(name, logits, target)
        return loss

    def _one(self, name: str, logits: Tensor, target: Tensor) -> Tensor:
        if name == "cross_entropy":
            return self._cross_entropy(logits, target)
        if name != "dice_per_image":
            value: Tensor = self.regions[name](logits, target)
            return value
        labelled = [i for i, own in enumerate(target) if bool((own != IGNORE_INDEX).any())]
        return torch.stack([self.regions[name](logits[i : i + 1], target[i : i + 1]) for i in labelled]).mean()

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.cross_entropy is not None:
            value: Tensor = self.cross_entropy(logits, target)
            return value
        valid = target != IGNORE_INDEX
        wanted = torch.where(valid, target, 0).float() * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
        each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * valid
        if isinstance(self.label_weights, Tensor):
            if len(self.label_weights) != logits.shape[1]:
                raise UserError(f"task.loss.class_weights: expected one for each of the {logits.shape[1]} labels.")
            each = each * self.label_weights[:, None, None]
        return each.sum() / valid.sum()


def _regions(names: Sequence[str], multilabel: bool, alpha: float, beta: float) -> dict[str, nn.Module]:
    wanted = [name for name in names if name != "cross_entropy"]
    if not wanted:
        return {}
    # Imported here because it brings timm and a hundred encoders: seconds, for runs that use cross-entropy only.
    from segmentation_models_pytorch import losses

    mode = losses.MULTILABEL_MODE if multilabel else losses.MULTICLASS_MODE
    common = {"mode": mode, "ignore_index": IGNORE_INDEX}
    # The focal loss cannot leave out pixels label by label: all labels' pixels go through its binary form together.
    focal = {**common, "mode": losses.BINARY_MODE} if multilabel else common
    make = {
        "dice_per_batch": lambda: losses.DiceLoss(**common),
        "dice_per_image": lambda: losses.DiceLoss(**common),
        "focal": lambda: losses.FocalLoss(**focal),
        "lovasz": lambda: losses.LovaszLoss(**common),
        "tversky": lambda: losses.TverskyLoss(alpha=alpha, beta=beta, **common),
    }
    return {name: make[name]() for name in wanted}
