"""Medical segmentation: losses as in segmentation, scores of each case first and then over the cases."""

from typing import Any

from torch import Tensor

from dense_heads.metrics.cases import CaseMeter, Protocol
from dense_heads.models.medical import decided, probability_maps
from dense_heads.structures import Batch
from dense_heads.training.segmentation import LabelModule


class MedicalModule(LabelModule):
    """Trains and measures medical segmentation heads on a frozen backbone."""

    def __init__(self, *args: Any, protocol: Protocol, **kwargs: Any) -> None:
        """`protocol`: how cases are measured; the rest is LabelModule's."""
        self.metric_names = protocol.names
        super().__init__(*args, **kwargs)
        self.protocol = protocol
        self.meters = [CaseMeter(protocol) for _ in self.candidates]
        self.details: list[dict[str, Any]] = []  # of each candidate, when it was measured last: spread, cases

    def predict(self, batch: Batch) -> list[list[Tensor]]:
        """Probabilities (K, H, W), each at its label's own size."""
        heads = [candidate.head for candidate in self.candidates]
        return probability_maps(self.backbone, heads, *self.looks(batch), self.inference, self.protocol.multilabel)

    def drawn(self, predictions: list[Tensor]) -> list[Tensor]:
        """Labels in place of probabilities."""
        objects = self.protocol.objects
        merged = predictions if objects is None else [objects.merged(prediction) for prediction in predictions]
        return [decided(prediction, self.protocol.multilabel) for prediction in merged]

    def reset_metrics(self) -> None:
        """No cases."""
        for meter in self.meters:
            meter.reset()

    def count(self, predictions: list[list[Tensor]], batch: Batch) -> None:
        """Add the slices to each candidate's cases."""
        spacing = batch["spacing"].tolist()
        for meter, maps in zip(self.meters, predictions, strict=True):
            for place, (prediction, mask) in enumerate(zip(maps, self.labels(batch), strict=True)):
                index, num = batch["slice_index"][place], batch["num_slices"][place]
                objects = batch["instances"][place] if "instances" in batch else None
                meter.update(batch["case_id"][place], index, num, spacing[place], prediction, mask, objects)

    def measure(self) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
        """Scores over cases and the per-class table of each candidate; `details` then holds the cases."""
        self.details = [meter.compute() for meter in self.meters]
        names = [self.class_names[index] for index in self.protocol.measured]
        tables = [
            [{"name": name, **row} for name, row in zip(names, found["per_class"], strict=True)]
            for found in self.details
        ]
        return [found["scores"] for found in self.details], tables
