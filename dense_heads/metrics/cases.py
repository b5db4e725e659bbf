"""Cases put together from their slices and measured as soon as they are whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dense_heads.metrics.instances import object_scores
from dense_heads.metrics.medical import (
    BINS,
    RATIOS,
    calibration_counts,
    calibration_error,
    class_row,
    mean_known,
    over_cases,
)
from dense_heads.ops.instances import Objects, numbered
from dense_heads.structures import IGNORE_INDEX

Array = npt.NDArray[Any]
Cases = Mapping[str, Mapping[str, Any]]  # case -> {"classes": [measurements of each class], "ece": ..., ...}
_COUNTS = ("tp", "fp", "fn")


@dataclass(frozen=True)
class Protocol:
    """How cases are measured.

    Args:
        num_classes: outputs of the head.
        multilabel: masks that overlap, one for each output; else one class for each pixel, the first one background.
        tolerance: of surface Dice, in `unit`.
        unit: of distances: `mm` or `px`.
        finish: last touch to a whole case's labels (components); None: none.
        objects: how single objects are told apart, where they are measured too.
    """

    num_classes: int
    multilabel: bool = False
    tolerance: float = 1.0
    unit: str = "mm"
    finish: Callable[[Array], Array] | None = None
    objects: Objects | None = None

    @property
    def measured(self) -> range:
        """The classes that have scores: without the background."""
        return range(0 if self.multilabel else 1, self.num_classes)

    @property
    def names(self) -> tuple[str, ...]:
        """The scores there are."""
        distances = (f"hd95_{self.unit}", f"assd_{self.unit}")
        objects = () if self.objects is None else ("ap", "ap50", "aji")
        return (*RATIOS, *distances, "volume_error", "ece", *objects, "dice_pooled")


@dataclass
class Parts:
    """A case while its slices come in."""

    num_slices: int
    spacing: tuple[float, ...]
    predictions: dict[int, Array] = field(default_factory=dict)  # slice -> (H, W) uint8, or (K, H, W) bool
    labels: dict[int, Array] = field(default_factory=dict)
    calibration: Array = field(default_factory=lambda: np.zeros((3, BINS)))
    more: dict[str, float] = field(default_factory=dict)  # scores of its objects

    def add(self, other: "Parts") -> None:
        """Take in what another process has seen of the case."""
        self.predictions |= other.predictions
        self.labels |= other.labels
        self.calibration += other.calibration


class CaseMeter:
    """The scores of a split, case by case, for one candidate."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.reset()

    def reset(self) -> None:
        """Start counting."""
        self.cases: dict[str, Mapping[str, Any]] = {}  # whole ones
        self._open: dict[str, Parts] = {}

    def update(
        self,
        case: str,
        index: int,
        num_slices: int,
        spacing: Sequence[float],
        probabilities: Tensor,
        mask: Tensor,
        instances: Tensor | None = None,
    ) -> None:
        """Add a slice.

        Args:
            case: which case.
            index: which of its slices.
            num_slices: how many it has.
            spacing: mm between slices, rows, columns.
            probabilities: (K, H, W); with objects as the head gives them.
            mask: (H, W) class ids, or with `multilabel` (K, H, W); 255 counts nowhere.
            instances: (H, W), the true objects, where they are measured.
        """
        parts = self._open.setdefault(case, Parts(num_slices, tuple(spacing)))
        label = mask.cpu().numpy()
        valid = label != IGNORE_INDEX
        if self.protocol.objects is not None:
            assert instances is not None and num_slices == 1, "objects are measured in images"
            objects = self.protocol.objects.found(probabilities.float().cpu().numpy())
            parts.more = object_scores(objects, numbered(instances.cpu().numpy()))
            probabilities = self.protocol.objects.merged(probabilities)
        found = probabilities.float().cpu().numpy()
        if self.protocol.multilabel:
            prediction, truth = (found > 0.5) & valid, (label == 1) & valid
            for channel, own, known in zip(found, truth, valid, strict=True):  # each label against its absence
                parts.calibration += calibration_counts(np.stack([1 - channel, channel]), own.astype(np.int64), known)
        else:
            prediction = np.where(valid, found.argmax(axis=0), 0).astype(np.uint8)
            truth = np.where(valid, label, 0).astype(np.uint8)
            parts.calibration += calibration_counts(found, label, valid)
        parts.predictions[index], parts.labels[index] = prediction, truth
        self._close(case)

    def _close(self, case: str, whole: bool = True) -> None:
        """Measure a case whose slices are all there; with `whole=False` those that there are."""
        parts = self._open[case]
        if whole and len(parts.labels) < parts.num_slices:
            return
        del self._open[case]
        order = sorted(parts.labels)
        prediction = np.stack([parts.predictions[i] for i in order], axis=-3)
        label = np.stack([parts.labels[i] for i in order], axis=-3)
        spacing = parts.spacing
        if len(order) == 1:  # a picture is measured in its plane
            prediction, label, spacing = prediction[..., 0, :, :], label[..., 0, :, :], spacing[1:]
        if self.protocol.finish is not None:
            prediction = self.protocol.finish(prediction)
        rows = [class_row(p, t, spacing, self.protocol.tolerance) for p, t in self._masks(prediction, label)]
        self.cases[case] = {"classes": rows, "ece": calibration_error(parts.calibration), **parts.more}

    def _masks(self, prediction: Array, label: Array) -> Iterator[tuple[Array, Array]]:
        for index in self.protocol.measured:
            if self.protocol.multilabel:
                yield prediction[index], label[index]
            else:
                yield prediction == index, label == index

    def finish(self) -> None:
        """Measure the cases that are not whole, by the slices that there are.

        A validation cut short (trainer.limit_val_batches) leaves a case without its last slices.
        """
        for case in list(self._open):
            self._close(case, whole=False)

    def gather(self) -> None:
        """Bring the cases of all processes together, and slices of one case from several."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self.finish()
            return
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (self.cases, self._open))
        self.cases, self._open = {}, {}
        for cases, unfinished in everyone:
            self.cases |= cases
            for case, parts in unfinished.items():
                if case in self._open:
                    self._open[case].add(parts)
                else:
                    self._open[case] = parts
        self.finish()

    def compute(self) -> dict[str, Any]:
        """`cases` (case -> its measurements, over all processes), and what `summary` makes of them."""
        self.gather()
        return {"cases": self.cases, **summary(self.cases, self.protocol)}


def summary(cases: Cases, protocol: Protocol) -> dict[str, Any]:
    """The scores of a split from the measurements of its cases.

    Returns:
        `scores` (name -> value), `spread` (name -> mean, std, low, high, number of cases), `per_class` (one row for
        each measured class), `rows` (case -> its scores, mean over classes).
    """
    rows = {case: _case_row(cases[case], protocol) for case in sorted(cases)}
    names = [name for name in protocol.names if name != "dice_pooled"]
    spread = {name: over_cases([row[name] for row in rows.values()]) for name in names}
    scores = {name: spread[name]["mean"] for name in names}
    per_class = [_class_row(cases, position, protocol) for position in range(len(protocol.measured))]
    scores["dice_pooled"] = mean_known([row["dice_pooled"] for row in per_class])
    return {"scores": scores, "spread": spread, "per_class": per_class, "rows": rows}


def named(row: Mapping[str, float], protocol: Protocol) -> dict[str, float]:
    """The measurements of a class under the names of scores, with their unit."""
    return {f"{name}_{protocol.unit}" if name in ("hd95", "assd") else name: value for name, value in row.items()}


def _case_row(case: Mapping[str, Any], protocol: Protocol) -> dict[str, Any]:
    rows = [named(row, protocol) for row in case["classes"]]
    means = {name: mean_known([row[name] for row in rows]) for name in rows[0] if name not in _COUNTS}
    more = {name: value for name, value in case.items() if name != "classes"}
    return {**means, **more, "no_distance": _without_distance(case["classes"])}


def _class_row(cases: Cases, position: int, protocol: Protocol) -> dict[str, Any]:
    raw = [case["classes"][position] for case in cases.values()]
    rows = [named(row, protocol) for row in raw]
    means = {n: mean_known([row[n] for row in rows]) for n in (rows[0] if rows else ()) if n not in _COUNTS}
    tp, fp, fn = (sum(row[count] for row in raw) for count in _COUNTS)
    pooled = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")
    return {**means, "dice_pooled": pooled, "no_distance": _without_distance(raw)}


def _without_distance(rows: Sequence[Mapping[str, float]]) -> int:
    return sum(bool(np.isnan(row["hd95"])) for row in rows)
