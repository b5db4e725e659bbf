"""Detection and instance segmentation: heads that bring their own losses, COCO's metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.detection import DetectionHead
from dense_heads.metrics.detection import DetectionMetrics, score_names
from dense_heads.models.detector import DetectionInference, check_fit, check_head, detections
from dense_heads.structures import Batch, Detection, Features
from dense_heads.training.base import Candidate, DenseModule

_TARGET = ("boxes", "labels", "iscrowd", "difficult", "area", "mask_codes")


class DetectionModule(DenseModule):
    """Trains and measures detection heads on a frozen backbone."""

    headline = ("map", "map_50", "map_75", "mask_map", "mask_map_50", "box_as_mask_map", "voc_map_50")

    def __init__(
        self,
        *args: Any,
        inference: DetectionInference,
        class_names: Sequence[str],
        evaluation: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        """`inference`: windows and flips of validation and test; `evaluation`: arguments of DetectionMetrics."""
        self.metric_names = score_names(**evaluation)
        super().__init__(*args, **kwargs)
        check_fit(self.backbone)
        self.inference = inference
        self.detectors = [check_head(candidate.head) for candidate in self.candidates]
        self.measures = [DetectionMetrics(class_names, **evaluation) for _ in self.candidates]
        known = {term for head in self.detectors for term in head.terms}
        for term in {term for candidate in self.candidates for term in getattr(candidate.loss, "weights", {})} - known:
            raise unknown_name("loss term in task.loss.weights:", term, sorted(known))
        for candidate, head in zip(self.candidates, self.detectors, strict=True):
            _check_masks(candidate.name, head, bool(evaluation["with_masks"]))

    def candidate_loss(self, candidate: Candidate, features: Features, batch: Batch) -> Tensor:
        """The head's own terms, weighted and summed."""
        terms = check_head(candidate.head).losses(features, batch)
        if len(self.candidates) == 1:
            self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        loss: Tensor = candidate.loss(terms)
        return loss

    def predict(self, batch: Batch) -> list[list[Detection]]:
        """The objects of each image, at its size on disk."""
        views = batch.get("views") or [[image] for image in batch["image"]]
        sizes = [(int(height), int(width)) for height, width in batch["original_size"]]
        return detections(self.backbone, self.detectors, views, sizes, self.inference)

    def reset_metrics(self) -> None:
        """Forget all images."""
        for measure in self.measures:
            measure.reset()

    def count(self, predictions: list[list[Detection]], batch: Batch) -> None:
        """Add to each candidate's metrics."""
        for measure, images in zip(self.measures, predictions, strict=True):
            for index, prediction in enumerate(images):
                target = {key: batch[key][index] for key in _TARGET if key in batch}  # type: ignore[literal-required]
                height, width = batch["original_size"][index].tolist()
                measure.count(prediction, target, (height, width))

    def measure(self) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
        """Average precisions and the per-class table of each candidate."""
        found = [measure.compute() for measure in self.measures]
        return [scores for scores, _ in found], [rows for _, rows in found]


def _check_masks(name: str, head: DetectionHead, wanted: bool) -> None:
    if wanted and not head.has_masks:
        raise UserError(
            f"{name} finds boxes alone, and this task asks for masks. Use head=mask_rcnn, or task.masks=false."
        )
    if head.has_masks and not wanted:
        raise UserError(
            f"{name} learns masks, which this task does not read. Set task.masks=true where the data have outlines, or "
            "use head=faster_rcnn."
        )
