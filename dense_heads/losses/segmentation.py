"""The loss of semantic segmentation: cross-entropy, Dice, focal, Lovasz, or a weighted sum of them."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.errors import UserError
from dense_heads.losses.cross_entropy import Terms, map_cross_entropy
from dense_heads.ops.across import mean_count
from dense_heads.ops.pad import Placement
from dense_heads.structures import IGNORE_INDEX


class SegmentationLoss(nn.Module):
    """Weighted sum of losses over the pixels that have a label.

    Cross-entropy is divided by the number of *all* pixels, those without a label included, as mmseg 0.27 does and
    DINOv2's heads were trained (class weights enter the sum only, not the divisor). PyTorch's own mean divides by
    valid pixels or by the sum of their weights: another effective learning rate.

    Dice (a mean over all classes, those absent from the batch counting 0), focal (gamma 2, one class against the
    rest) and Lovasz (softmax, classes present in the batch) are those of segmentation_models_pytorch, over the batch.
    A batch without any labelled pixel gives a loss of 0 with gradients of 0.

    Args:
        cross_entropy: weight of cross-entropy.
        dice: weight of the Dice loss.
        focal: weight of the focal loss.
        lovasz: weight of the Lovasz-softmax loss.
        class_weights: for each class its weight in cross-entropy; None weighs all alike.
        avg_non_ignore: divide cross-entropy by the number of labelled pixels instead of all.
        ignore_index: label of pixels that have no label.
        label_smoothing: share of cross-entropy's target that is spread over all classes, 0 to 1.

    Raises:
        UserError: weights that are negative, not finite or all 0; class weights without cross-entropy;
            `label_smoothing` outside 0 to 1.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        cross_entropy: float = 1.0,
        dice: float = 0.0,
        focal: float = 0.0,
        lovasz: float = 0.0,
        class_weights: Sequence[float] | None = None,
        avg_non_ignore: bool = False,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        weights = _checked({"cross_entropy": cross_entropy, "dice": dice, "focal": focal, "lovasz": lovasz}, "loss")
        if not (_is_number(label_smoothing) and 0 <= label_smoothing <= 1):
            raise UserError(f"loss.label_smoothing={label_smoothing!r}: expected a number from 0 to 1.")
        if class_weights is not None:
            if weights["cross_entropy"] == 0:
                raise UserError(
                    "loss.class_weights is set while loss.cross_entropy is 0: class weights act on cross-entropy only. "
                    "Give cross_entropy a weight, or leave class_weights out."
                )
            by_class = {str(index): weight for index, weight in enumerate(class_weights)}
            class_weights = list(_checked(by_class, "loss.class_weights").values())
        # Not persistent: it is configuration, and a checkpoint should not bring another one back.
        self.register_buffer(
            "class_weights", None if class_weights is None else torch.tensor(class_weights), persistent=False
        )
        self.cross_entropy_weight = weights.pop("cross_entropy")
        self.avg_non_ignore = avg_non_ignore
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.region_weights = {name: weight for name, weight in weights.items() if weight > 0}
        self.region_losses = nn.ModuleDict(_region_losses(tuple(self.region_weights), ignore_index))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            logits: (B, K, H, W), at the label's size.
            target: (B, H, W) int64, `ignore_index` where there is no label.

        Returns:
            Scalar, float32.

        Raises:
            UserError: class weights for another number of classes.
        """
        assert logits.shape[:1] + logits.shape[2:] == target.shape, (tuple(logits.shape), tuple(target.shape))
        logits = logits.float()  # sums over a batch's pixels need more digits than half precision has
        loss = logits[:0].sum()  # 0, with gradients of 0
        if self.cross_entropy_weight > 0:
            loss = loss + self.cross_entropy_weight * self._cross_entropy(logits, target)
        # Over no pixel at all the focal loss is nan and Lovasz has no value.
        if self.region_weights and bool((target != self.ignore_index).any()):
            for name, weight in self.region_weights.items():
                loss = loss + weight * self.region_losses[name](logits, target)
        return loss

    def of_map(self, map: Tensor, target: Tensor, placement: Placement) -> Tensor:
        """The same for a head's map, enlarged to the label's size; cross-entropy alone never has full-size logits.

        Args:
            map: (B, K, h, w), at any resolution.
            target: as in `forward`.
            placement: how the map lies on the label's pixels.
        """
        map = map.float()
        if self.region_weights or map.shape[-2:] == placement.padded_size:
            loss: Tensor = self(placement.enlarge(map), target)
            return loss
        terms = Terms(self._checked_class_weights(map.shape[1]), self.ignore_index, self.label_smoothing)
        return self.cross_entropy_weight * self._divided(map_cross_entropy(map, target, placement, terms), target)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        total = F.cross_entropy(
            logits,
            target,
            weight=self._checked_class_weights(logits.shape[1]),
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return self._divided(total, target)

    def _divided(self, total: Tensor, target: Tensor) -> Tensor:
        if not self.avg_non_ignore:
            return total / target.numel()
        return total / mean_count(target != self.ignore_index)

    def _checked_class_weights(self, num_classes: int) -> Tensor | None:
        weights = self.class_weights
        if weights is not None and len(weights) != num_classes:
            raise UserError(
                f"loss.class_weights has {len(weights)} values; expected one for each of the {num_classes} classes, in "
                "the order of classes.txt."
            )
        return weights


def _region_losses(names: Sequence[str], ignore_index: int) -> dict[str, nn.Module]:
    if not names:
        return {}
    # Imported here because it brings timm and a hundred encoders: seconds, for runs that use cross-entropy only.
    from segmentation_models_pytorch import losses

    classes = {"dice": losses.DiceLoss, "focal": losses.FocalLoss, "lovasz": losses.LovaszLoss}
    return {name: classes[name](mode=losses.MULTICLASS_MODE, ignore_index=ignore_index) for name in names}


def _checked(weights: Mapping[str, float], what: str) -> dict[str, float]:
    """The weights as floats, if each is a finite number from 0 and one is above 0."""
    for name, weight in weights.items():
        if not (_is_number(weight) and math.isfinite(weight) and weight >= 0):
            raise UserError(f"{what}.{name}={weight!r}: expected a finite number, 0 or above.")
    if not any(weight > 0 for weight in weights.values()):
        raise UserError(f"{what}: all weights are 0, so nothing would be learnt. Set at least one above 0.")
    return {name: float(weight) for name, weight in weights.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
