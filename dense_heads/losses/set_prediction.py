"""Losses of a set of predictions: each object is matched with one query, all other queries are to say nothing.

DETR (Carion et al., ECCV 2020) with a focal loss and GIoU, as Plain DETR trains it (facts sheet 7.5).
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

TERMS = ("class", "box", "giou")


class SetCriterion(nn.Module):
    """Matches by the Hungarian method on the weighted costs, then sums the weighted losses over the matched pairs.

    Args:
        class_weight: of the focal loss, in matching and in the loss.
        box_weight: of the L1 distance between the box that a query would have to say and the one it says, both as
            corrections of the box that it started from.
        giou_weight: of 1 - GIoU.
        alpha: of the focal loss.
        gamma: of the focal loss.
    """

    def __init__(
        self,
        class_weight: float = 2.0,
        box_weight: float = 1.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.weights = {"class": class_weight, "box": box_weight, "giou": giou_weight}
        self.alpha, self.gamma = alpha, gamma

    def forward(
        self, said: Mapping[str, Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor], repeat: int = 1
    ) -> dict[str, Tensor]:
        """The three terms, each over the number of objects in the batch.

        Args:
            said: of Q queries: `logits` (B, Q, K), `boxes` (B, Q, 4) xyxy in shares, `deltas` (B, Q, 4), and `start`
                (B, Q, 4), the boxes that they correct.
            boxes: for each image (n, 4) xyxy in shares.
            labels: for each image (n,).
            repeat: so many queries are matched with each object (one-to-many).
        """
        boxes = [own.repeat(repeat, 1) for own in boxes]
        labels = [own.repeat(repeat) for own in labels]
        wanted = torch.zeros_like(said["logits"])
        distances, overlaps = [], []
        for image, (own, kinds) in enumerate(zip(boxes, labels, strict=True)):
            one = {name: values[image] for name, values in said.items()}
            queries, objects = self.match(one, own, kinds)
            wanted[image, queries, kinds[objects]] = 1
            distances.append((one["deltas"][queries] - corrections(one["start"][queries], own[objects])).abs().sum())
            overlaps.append((1 - generalized_box_iou(one["boxes"][queries], own[objects]).diagonal()).sum())
        num = max(1, sum(len(own) for own in boxes))
        focal = sigmoid_focal_loss(said["logits"], wanted, self.alpha, self.gamma, reduction="sum")
        terms = {"class": focal, "box": torch.stack(distances).sum(), "giou": torch.stack(overlaps).sum()}
        return {name: self.weights[name] * term / num for name, term in terms.items()}

    @torch.no_grad()
    def match(self, said: Mapping[str, Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and objects of one image that belong together, (m,) each, m the smaller of their numbers."""
        logits = said["logits"][:, labels]
        right = self.alpha * (-logits).sigmoid() ** self.gamma * F.softplus(-logits)
        wrong = (1 - self.alpha) * logits.sigmoid() ** self.gamma * F.softplus(logits)
        distance = (said["deltas"][:, None] - corrections(said["start"][:, None], boxes[None])).abs().sum(-1)
        cost = (
            self.weights["class"] * (right - wrong)
            + self.weights["box"] * distance
            - self.weights["giou"] * generalized_box_iou(said["boxes"], boxes)
        )
        cost = torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6)  # a loss that is none is found after this
        queries, objects = linear_sum_assignment(cost.cpu().double().numpy())
        return (torch.as_tensor(queries, device=boxes.device), torch.as_tensor(objects, device=boxes.device))


def corrections(start: Tensor, boxes: Tensor) -> Tensor:
    """What turns boxes `start` into `boxes`, (..., 4) each: the way of the centre in sides of `start`, their growth."""
    sides = (start[..., 2:] - start[..., :2]).clamp(min=1e-6)
    way = ((boxes[..., :2] + boxes[..., 2:]) - (start[..., :2] + start[..., 2:])) / 2 / sides
    growth = ((boxes[..., 2:] - boxes[..., :2]).clamp(min=1e-6) / sides).log()
    return torch.cat([way, growth], dim=-1)
