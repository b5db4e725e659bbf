"""Otsu's thresholds measured as heads are: what medical scores stand beside."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from dense_heads.build.data import Loaded, num_measured
from dense_heads.data.otsu import MOST_CLASSES, Case, cases_of, decided_on
from dense_heads.metrics.cases import CaseMeter, Cases, Protocol, summary

NAME = "Otsu's threshold"
RULE = (
    " Otsu's threshold: the grey of each case (of colours the luminance, of several modalities the first) is cut into "
    "as many ranges as there are classes by thresholds of that case alone, over the pixels that count; which range is "
    "which class is decided on the training images, or on those that a head without training looked at, by the mean "
    "Dice over them. It has no probabilities, so no ECE."
)


def applies(protocol: Protocol) -> bool:
    """Whether classes can be ranges of grey: a few, without overlap."""
    return not protocol.multilabel and 2 <= protocol.num_classes <= MOST_CLASSES


def measured(cfg: DictConfig, loaded: Loaded, stage: str, protocol: Protocol) -> dict[str, Any] | None:
    """`result` of the cases that the heads were measured on; None where thresholds make no sense."""
    train, data = loaded.support, loaded.test if stage == "test" else loaded.val
    if train is None or data is None or not applies(protocol):
        return None
    class_of = decided_on(train, protocol.num_classes)
    meter = CaseMeter(protocol)
    for case in cases_of(data, num_measured(cfg, stage, len(data))):  # type: ignore[arg-type]
        _update(meter, case, class_of)
    meter.finish()
    return result(meter.cases, protocol, stage, [loaded.classes.names[index] for index in class_of])


def result(cases: Cases, protocol: Protocol, stage: str, ranges: Sequence[str] | None) -> dict[str, Any]:
    """For `metrics.json`: name, classes of the ranges from dark to bright, scores, their spread; and the cases."""
    found = summary(cases, protocol)
    return {
        "name": NAME,
        "ranges": ranges,
        "metrics": _named(found["scores"], stage),
        "spread": _named(found["spread"], stage),
        "cases": dict(cases),
    }


def _named(values: Mapping[str, Any], stage: str) -> dict[str, Any]:
    return {f"{stage}/{name}": value for name, value in values.items() if name != "ece"}


def _update(meter: CaseMeter, case: Case, class_of: Sequence[int]) -> None:
    objects = meter.protocol.objects
    num_outputs = meter.protocol.num_classes if objects is None else objects.num_outputs
    found = np.asarray(class_of)[case.ranges(meter.protocol.num_classes)]
    for item, labels in zip(case.items, found, strict=True):
        sure = F.one_hot(torch.from_numpy(labels), num_outputs).permute(2, 0, 1).float()
        place = item["case_id"], item["slice_index"], item["num_slices"], item["spacing"]
        meter.update(*place, sure, item["mask"], item.get("instances"))
