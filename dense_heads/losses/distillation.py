"""How far a student's tokens, or its opinion of each pixel, are from a teacher's."""

import torch
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


def soft_divergence(logits: Tensor, aim: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(aim / T) || softmax(logits / T)) of each pixel (arXiv 1503.02531): 0 where the two agree.

    Args:
        logits: (B, K, H, W) of the student.
        aim: the same of the teacher.
        temperature: T; above 1 the classes that the teacher finds improbable count for more.

    Returns:
        (B, H, W), float32; with T^2 the gradients keep their size whatever T is.
    """
    ours = F.log_softmax(logits.float() / temperature, dim=1)
    theirs = F.log_softmax(aim.float() / temperature, dim=1)
    return temperature**2 * torch.sum(theirs.exp() * (theirs - ours), dim=1)


def similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean cosine between the predicted and the normalised target tokens (..., D)."""
    return F.cosine_similarity(predicted.float(), normalised(target), dim=-1).mean()


def normalised(tokens: Tensor) -> Tensor:
    """(..., D) with mean 0 and deviation 1 of each token."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])
