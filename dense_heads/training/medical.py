"""Medical segmentation: losses as in segmentation, scores of each case first and then over the cases."""

from typing import Any

import torch
from torch import Tensor

from dense_heads.metrics.cases import CaseMeter, Protocol
from dense_heads.models.medical import Refine, decided, probability_maps
from dense_heads.structures import Batch
from dense_heads.training.segmentation import LabelModule


class MedicalModule(LabelModule):
    """Trains and measures medical segmentation heads on a frozen backbone."""

    def __init__(self, *args: Any, protocol: Protocol, refine: Refine, **kwargs: Any) -> None:
        """`protocol`: how cases are measured; `refine`: what is done to predictions; the rest is LabelModule's."""
        self.metric_names = protocol.names
        super().__init__(*args, **kwargs)
        self.protocol, self.refine = protocol, refine
        self.meters = [CaseMeter(protocol) for _ in self.candidates]

    def predict(self, batch: Batch) -> list[list[Tensor]]:
        """Probabilities (K, H, W), each at its label's own size."""
        heads = [candidate.head for candidate in self.candidates]
        seen = self.looks(batch)
        return probability_maps(self.backbone, heads, *seen, self.inference, self.protocol.multilabel, self.refine)

    def shown(self, predictions: list[Tensor]) -> list[Tensor]:
        """Labels in place of probabilities; of single objects their numbers."""
        objects = self.protocol.objects
        if objects is None:
            return [decided(prediction, self.protocol.multilabel) for prediction in predictions]
        return [torch.from_numpy(objects.found(prediction.cpu().numpy())) for prediction in predictions]

    def known(self, batch: Batch) -> Tensor | list[Tensor]:
        """The labels that `shown` stands beside."""
        return self.labels(batch) if self.protocol.objects is None else batch["instances"]

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

    def is_measured(self, stage: str, step: int) -> bool:
        """As DenseModule; and the cases are still here."""
        return super().is_measured(stage, step) and bool(self.details)

    def measure(self) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
        """Scores over cases and the per-class table of each candidate; `details` then holds the cases."""
        self.details = [meter.compute() for meter in self.meters]
        return [found["scores"] for found in self.details], [self._table(found["per_class"]) for found in self.details]

    def _table(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [self.class_names[index] for index in self.protocol.measured]
        return [{"name": name, **row} for name, row in zip(names, rows, strict=True)]
