"""The losses of DINOv2's training (facts sheet 4.1; arXiv 2304.07193, section 4).

Teacher probabilities are made first (`SoftmaxCenter` or `sinkhorn_knopp`), then compared with the student's logits
(`dino_loss`, `ibot_loss`); `koleo_loss` spreads the student's features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.ops.across import gathered, logsumexp, total

STUDENT_TEMPERATURE = 0.1
KOLEO_EPS = 1e-8


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher logits (M, K) -> probabilities (M, K) that use all prototypes equally over the joined processes.

    As the original, but on logarithms: sums of exponentials of any finite logits stay finite. The number of rows M may
    differ between processes, and be 0 in one of them.
    """
    scores = logits.float() / temperature
    rows = total(torch.tensor(float(len(logits)), device=logits.device))
    scores = scores - logsumexp(scores, (0, 1))
    for _ in range(iterations):
        scores = scores - logsumexp(scores, 0) - torch.log(scores.new_tensor(float(scores.shape[1])))
        scores = scores - scores.logsumexp(1, keepdim=True) - rows.log()
    return (scores + rows.log()).exp()


class SoftmaxCenter(nn.Module):
    """Teacher logits -> softmax around a running centre, so that no prototype wins everywhere.

    The centre moves after a batch and acts from the next one on, as in the original.
    """

    center: Tensor

    def __init__(self, num_prototypes: int, momentum: float = 0.9) -> None:
        """The centre starts at 0."""
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """(M, K) -> (M, K)."""
        return ((logits.float() - self.center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def update(self, logits: Tensor) -> None:
        """Move towards the mean of the (M, K) logits over all processes."""
        sums = total(torch.cat((logits.float().sum(0), logits.new_tensor([len(logits)], dtype=torch.float32))))
        if sums[-1] > 0:
            self.center.mul_(self.momentum).add_(sums[:-1] / sums[-1], alpha=1 - self.momentum)


def dino_loss(student_logits: Tensor, teacher: Tensor, temperature: float = STUDENT_TEMPERATURE) -> Tensor:
    """Cross-entropy of the student's logits (B, K) to the teacher's probabilities (B, K), mean over the batch."""
    return _cross_entropy(student_logits, teacher, temperature).mean()


def ibot_loss(
    student_logits: Tensor,
    teacher: Tensor,
    masks: Tensor,
    num_images: int | None = None,
    temperature: float = STUDENT_TEMPERATURE,
) -> Tensor:
    """Cross-entropy on masked patches, each image with the weight 1 however many of its patches are masked.

    Args:
        student_logits: (M, K), those of the masked patches in the order of `masks`.
        teacher: (M, K) probabilities.
        masks: (B, N) bool with M true values.
        num_images: what the sum is divided by; B, images without a mask included, if None.
        temperature: of the student.
    """
    weights = (1.0 / masks.sum(1).clamp(min=1).float()).unsqueeze(1).expand_as(masks)[masks]
    losses = _cross_entropy(student_logits, teacher, temperature) * weights
    return losses.sum() / (num_images or len(masks))


def _cross_entropy(student_logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return -(teacher.float() * F.log_softmax(student_logits.float() / temperature, dim=-1)).sum(-1)


def koleo_loss(features: Tensor, gather: bool = False) -> Tensor:
    """Minus the mean log distance of each L2-normalised feature (B, D) to its nearest neighbour in the batch.

    Args:
        features: not normalised.
        gather: neighbours are looked for over all processes; the original stays within each one.
    """
    with torch.autocast(features.device.type, enabled=False):
        points = F.normalize(features.float(), eps=KOLEO_EPS, dim=-1)
        everything = gathered(points) if gather else points
        if len(everything) < 2:
            return points.sum() * 0.0  # a point without a neighbour
        with torch.no_grad():
            similarity = everything @ everything.T
            nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
        distances = F.pairwise_distance(everything, everything[nearest], p=2.0, eps=KOLEO_EPS)
        loss: Tensor = -torch.log(distances + KOLEO_EPS).mean()
        return loss


def relational_loss(features: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference between the cosines among features (B, D) and among targets (B, E), B at least 2.

    Within each process, as KoLeo is. Source: relational and similarity-preserving distillation (Park et al., arXiv
    1904.05068; Tung and Mori, arXiv 1907.09682), on cosines.
    """
    own, wanted = (F.normalize(x.float(), dim=1) for x in (features, targets))
    pairs = ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    return (own @ own.T - wanted @ wanted.T)[pairs].square().mean()


def teacher_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of (M, K) probabilities, in nats: ln K when the teacher says nothing, 0 when it is sure."""
    entropy: Tensor = -torch.special.xlogy(probabilities, probabilities).sum(-1).mean()
    return entropy
