"""Monocular depth: the loss at label resolution on measured pixels, metrics by image or by pixel."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dense_heads.metrics.depth import SCORES, DepthMetrics, scores
from dense_heads.models.depther import depth_maps
from dense_heads.models.inference import Inference
from dense_heads.structures import Batch, Features
from dense_heads.training.base import Candidate, DenseModule


class DepthModule(DenseModule):
    """Trains and measures depth heads on a frozen backbone."""

    metric_names = SCORES

    def __init__(self, *args: Any, inference: Inference, evaluation: Mapping[str, Any], **kwargs: Any) -> None:
        """`inference`: windows and flips of validation and test; `evaluation`: arguments of DepthMetrics."""
        super().__init__(*args, **kwargs)
        self.inference = inference
        self.measures = nn.ModuleList(DepthMetrics(**evaluation) for _ in self.candidates)

    def loss(self, candidate: Candidate, output: Tensor, features: Features, batch: Batch) -> Tensor:
        """The candidate's loss on metres brought to label resolution."""
        depth_m = batch["depth_m"]
        assert isinstance(depth_m, Tensor)
        loss: Tensor = candidate.loss(self.backbone.placement(features).enlarge(output.float())[:, 0], depth_m)
        return loss

    def predict(self, batch: Batch) -> list[list[Tensor]]:
        """Metres (H, W), each at its label's own size."""
        views = batch.get("views") or [[image] for image in batch["image"]]
        sizes = [(int(depth.shape[-2]), int(depth.shape[-1])) for depth in batch["depth_m"]]
        heads = [candidate.head for candidate in self.candidates]
        return depth_maps(self.backbone, heads, views, sizes, self.inference)

    def reset_metrics(self) -> None:
        """Empty sums."""
        for measure in self.measures:
            measure.reset()  # type: ignore[operator]

    def count(self, predictions: list[list[Tensor]], batch: Batch) -> None:
        """Add to each candidate's sums."""
        for measure, maps in zip(self.measures, predictions, strict=True):
            for prediction, depth_m in zip(maps, batch["depth_m"], strict=True):
                measure.update(prediction, depth_m)  # type: ignore[operator]

    def measure(self) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
        """The metrics of each candidate; depth has no per-class table."""
        found = [scores(measure.compute()) for measure in self.measures]  # type: ignore[operator]
        return found, [[] for _ in self.measures]
