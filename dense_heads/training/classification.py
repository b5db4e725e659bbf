"""Classes of whole images: cross-entropy, accuracy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dense_heads.metrics.classification import SCORES, hits, per_class, scores
from dense_heads.models.classifier import class_probabilities
from dense_heads.models.inference import Inference
from dense_heads.ops.across import total
from dense_heads.structures import Batch, Features
from dense_heads.training.base import Candidate, DenseModule


class ClassificationModule(DenseModule):
    """Trains and measures classification heads on a frozen backbone."""

    metric_names = SCORES
    headline = ("top1", "top5")

    def __init__(self, *args: Any, inference: Inference, class_names: Sequence[str], **kwargs: Any) -> None:
        """`inference`: windows and flips of validation and test."""
        super().__init__(*args, **kwargs)
        self.inference, self.class_names = inference, list(class_names)
        self.reset_metrics()

    def loss(self, candidate: Candidate, output: Tensor, features: Features, batch: Batch) -> Tensor:
        """The candidate's loss of the scores (B, K)."""
        value: Tensor = candidate.loss(output.float(), batch["class_id"])
        return value

    def predict(self, batch: Batch) -> list[list[dict[str, Tensor]]]:
        """`probabilities` (K,) of each image."""
        heads = [candidate.head for candidate in self.candidates]
        found = class_probabilities(self.backbone, heads, batch["views"], self.inference)
        return [[{"probabilities": image} for image in images] for images in found]

    def reset_metrics(self) -> None:
        """Start counting."""
        self.counts = [torch.zeros(len(self.class_names), 3, dtype=torch.long) for _ in self.candidates]

    def count(self, predictions: list[list[dict[str, Tensor]]], batch: Batch) -> None:
        """Add to each candidate's counts."""
        for counts, images in zip(self.counts, predictions, strict=True):
            probabilities = torch.stack([image["probabilities"] for image in images])
            counts += hits(probabilities, batch["class_id"]).cpu()

    def measure(self) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
        """Accuracies, and the per-class table, of each candidate."""
        sums = [total(counts.to(self.device)).cpu() for counts in self.counts]
        return [scores(counts) for counts in sums], [per_class(counts, self.class_names) for counts in sums]
