"""How far a student's tokens are from a teacher's."""

import torch.nn.functional as F
from torch import Tensor


def feature_loss(predicted: Tensor, target: Tensor, cosine: float = 1.0, smooth_l1: float = 1.0) -> Tensor:
    """`cosine` * (1 - cosine) + `smooth_l1` * smooth-L1 to the target, each token normalised; mean over tokens.

    Args:
        predicted: (..., D), as it comes out of the student's projection.
        target: (..., D) of the teacher; less its mean and divided by its deviation, token by token, here.
        cosine: weight of the first term.
        smooth_l1: weight of the second.
    """
    predicted, aim = predicted.float(), normalised(target)
    loss = cosine * (1 - F.cosine_similarity(predicted, aim, dim=-1)).mean()
    return loss + smooth_l1 * F.smooth_l1_loss(predicted, aim)


def similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean cosine between the predicted and the normalised target tokens (..., D)."""
    return F.cosine_similarity(predicted.float(), normalised(target), dim=-1).mean()


def normalised(tokens: Tensor) -> Tensor:
    """(..., D) with mean 0 and deviation 1 of each token."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])
