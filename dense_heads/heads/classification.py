"""Heads that name the one class of a whole image: DINOv2's linear classifier and weighted k-NN (facts sheet 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.heads.training_free import TrainingFreeHead
from dense_heads.ops.neighbours import TEMPERATURE, knn_probabilities
from dense_heads.structures import Batch, Features


class ClassificationHead(Head):
    """Features -> scores (B, num_outputs) of whole images, to go through a softmax.

    Patch maps are seen as their means alone, so a feature cache need not keep more.
    """


class LinearClassifier(ClassificationHead):
    """A linear layer on the cls tokens of the chosen blocks and, on request, the mean patch of the last one.

    As in DINOv2's eval/linear.py: weights drawn with deviation 0.01, the bias 0.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        mean_patch: bool = False,
        init_std: float = 0.01,
    ) -> None:
        """`mean_patch`: also the mean of the last block's patch tokens (DINOv2's `avgpool`)."""
        super().__init__(in_channels, num_outputs, blocks, norm)
        self.mean_patch = mean_patch
        self.linear = nn.Linear(sum(self.in_channels) + mean_patch * self.in_channels[-1], num_outputs)
        nn.init.normal_(self.linear.weight, std=init_std)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        parts = [*features.cls_tokens, *([features.patch_maps[-1].mean((2, 3))] if self.mean_patch else [])]
        scores: Tensor = self.linear(torch.cat(parts, dim=1))
        return scores


class NearestImages(ClassificationHead, TrainingFreeHead):
    """The k most similar images of a labelled bank vote, weighted by softmax(cosine / temperature); no training.

    Wu et al. 2018 (arXiv 1805.01978) as in DINOv2's eval/knn.py. Scores are logarithms of the votes.

    Raises:
        UserError: arguments out of range; in `conclude`: no labelled image was seen.
    """

    bank: Tensor
    classes: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        k: int = 20,
        temperature: float = TEMPERATURE,
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if not isinstance(k, int) or isinstance(k, bool) or k < 1 or not temperature > 0:
            raise UserError(
                f"head.k={k!r}, temperature={temperature}; expected whole numbers from 1 on, and a temperature above 0."
            )
        self.k, self.temperature = k, temperature
        self.register_buffer("bank", torch.zeros(0, sum(self.in_channels)))  # (M, D)
        self.register_buffer("classes", torch.zeros(0, dtype=torch.long))  # (M,)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def observe(self, features: Features, batch: Batch) -> None:
        """Take in images and their `class_id` (B,)."""
        self._seen.append((torch.cat(features.cls_tokens, dim=1), batch["class_id"]))

    def conclude(self) -> None:
        """Make the bank."""
        if not self._seen:
            raise UserError("head=knn has seen no labelled image. Leave support out, or set support=20.")
        self.bank, self.classes = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen = []

    def forward(self, features: Features) -> Tensor:
        """See the class."""
        queries = torch.cat(features.cls_tokens, dim=1)
        votes = knn_probabilities(queries, self.bank, self.classes, self.num_outputs, [self.k], self.temperature)
        return votes[self.k].clamp(min=1e-12).log()
