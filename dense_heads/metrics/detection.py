"""Scores of detection and instance segmentation: COCO's average precision of boxes and of masks."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

from dense_heads.errors import UserError
from dense_heads.metrics.voc import VOC_CONVENTIONS, VocPrecision
from dense_heads.ops import masks
from dense_heads.structures import Detection, Size

COCO_SCORES = (
    "map", "map_50", "map_75", "map_small", "map_medium", "map_large",
    "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip
_IOU = np.linspace(0.5, 0.95, 10).tolist()  # in double precision, as pycocotools has them
_RECALL = np.linspace(0.0, 1.0, 101).tolist()
_STATES = (
    "detection_box", "detection_mask", "detection_scores", "detection_labels",
    "groundtruth_box", "groundtruth_mask", "groundtruth_labels", "groundtruth_crowds", "groundtruth_area",
)  # fmt: skip

CONVENTIONS = (
    "Boxes are compared at the image's own size, by COCO's rules (torchmetrics with faster-coco-eval): detections of a "
    "class, best first, each take the object that they overlap most; average precision is the mean of 101 points of "
    "the precision-recall curve, map over IoU thresholds 0.50 to 0.95 in steps of 0.05, map_50 and map_75 at one; mar "
    "is the mean of the highest recalls with at most so many detections of an image. Small is an annotated area below "
    "32 x 32 pixels, large one above 96 x 96. Scores are means over the classes that have objects. Crowd regions are "
    "neither misses nor false alarms."
)
MASK_CONVENTIONS = (
    " Scores that start with mask_ compare instance masks in place of boxes; box_as_mask_ ones take the predicted "
    "boxes for the masks: the floor that a mask head must beat."
)


class CocoPrecision(MeanAveragePrecision):
    """torchmetrics' COCO metric, given double precision and run-length codes, and safe on uneven processes.

    Its own `update` would turn codes of masks into pixels and back; its own synchronisation expects the same number of
    images in every process.
    """

    def __init__(self, with_masks: bool = False, max_detections: Sequence[int] = (1, 10, 100)) -> None:
        """`with_masks`: scores of masks beside those of boxes; `max_detections`: three numbers, ascending."""
        super().__init__(
            iou_type=("bbox", "segm") if with_masks else "bbox",
            iou_thresholds=_IOU,
            rec_thresholds=_RECALL,
            max_detection_thresholds=list(max_detections),
            extended_summary=True,  # the precision of each class
            backend="faster_coco_eval",
            sync_on_compute=False,
            compute_with_cache=False,
        )

    def count(self, prediction: Detection, codes: Iterable[str] | None, target: Mapping[str, Any], size: Size) -> None:
        """Add one image.

        Args:
            prediction: boxes (n, 4) xyxy, scores and labels (n,).
            codes: n run-length codes of the predicted masks.
            target: boxes (m, 4), labels, iscrowd, area (m,), and mask_codes.
            size: (height, width) of the image.
        """
        self._update_count += 1
        self._computed = None
        for part, found in (("detection", prediction), ("groundtruth", target)):
            boxes = found["boxes"].detach().cpu().double()
            getattr(self, f"{part}_box").append(box_convert(boxes, "xyxy", "xywh"))
            getattr(self, f"{part}_labels").append(found["labels"].detach().cpu())
        self.detection_scores.append(prediction["scores"].detach().cpu())
        self.groundtruth_crowds.append(target["iscrowd"].cpu().int())
        self.groundtruth_area.append(target["area"].cpu())
        if "segm" in self.iou_type:
            assert codes is not None
            for part, each in (("detection", codes), ("groundtruth", target["mask_codes"])):
                packed = tuple((tuple(size), code.encode("ascii")) for code in each)
                getattr(self, f"{part}_mask").append(packed)

    def gather(self) -> None:
        """Bring the images of all processes together, in the order of one process."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, {name: getattr(self, name) for name in _STATES})
        for name in _STATES:
            rows = itertools.zip_longest(*(states[name] for states in every))
            setattr(self, name, [image for row in rows for image in row if image is not None])


class DetectionMetrics:
    """All scores of one candidate over a data set.

    Args:
        class_names: of the labels 0, 1, ...
        with_masks: whether predictions have masks, to be scored too.
        max_detections: of an image, three numbers; the last one holds for map.
        box_as_mask: also score the predicted boxes as if they were masks.
        voc: also VOC 2007's score.

    Raises:
        UserError: numbers of detections that make no sense.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        with_masks: bool = False,
        max_detections: Sequence[int] = (1, 10, 100),
        box_as_mask: bool = False,
        voc: bool = False,
    ) -> None:
        numbers = list(max_detections)
        if len(numbers) != 3 or sorted(set(numbers)) != numbers or numbers[0] < 1:
            raise UserError(f"max_detections={numbers}; expected three ascending numbers, such as [1, 10, 100].")
        self.class_names, self.with_masks, self.max_detections = list(class_names), with_masks, numbers
        self.coco = CocoPrecision(with_masks, numbers)
        self.as_masks = CocoPrecision(True, numbers) if with_masks and box_as_mask else None
        self.voc = VocPrecision(len(self.class_names)) if voc else None

    def reset(self) -> None:
        """Start counting."""
        for part in (self.coco, self.as_masks, self.voc):
            if part is not None:
                part.reset()

    def count(self, prediction: Detection, target: Mapping[str, Any], size: Size) -> None:
        """Add one image of (height, width); see CocoPrecision.count. Masks of the prediction are inside its boxes."""
        codes = None
        if self.with_masks:
            whole = masks.pasted(prediction["masks"], prediction["boxes"], size)
            codes = [masks.encode(mask) for mask in whole]
        self.coco.count(prediction, codes, target, size)
        if self.as_masks is not None:
            filled = [masks.encode(mask) for mask in masks.filled_boxes(prediction["boxes"], size)]
            self.as_masks.count(prediction, filled, target, size)
        if self.voc is not None:
            self.voc.count(prediction, target)

    def compute(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores by name, nan where there is nothing to score, and a row for each class."""
        found = self._scored(self.coco)
        rows: list[dict[str, Any]] = [{"name": name} for name in self.class_names]
        scores: dict[str, float] = {}
        kinds = {"bbox_": "", "segm_": "mask_"} if self.with_masks else {"": ""}
        for theirs, ours in kinds.items():
            scores.update(self._named(found, theirs, ours))
            self._per_class(found, theirs, ours, rows)
        if self.as_masks is not None:
            filled = self._named(self._scored(self.as_masks), "segm_", "box_as_mask_")
            scores.update({name: value for name, value in filled.items() if name.startswith("box_as_mask_map")})
        if self.voc is not None:
            each = self.voc.compute()
            known = [value for value in each if value == value]
            scores["voc_map_50"] = float(np.mean(known)) if known else float("nan")
            for row, value in zip(rows, each, strict=True):
                row["voc_ap_50"] = value
        return scores, rows

    def _scored(self, metric: CocoPrecision) -> dict[str, Tensor]:
        metric.gather()
        result: dict[str, Tensor] = metric.compute()
        return result

    def _named(self, found: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, float]:
        scores = {}
        for name in names(self.max_detections):
            value = float(found[f"{theirs}{name}"])
            scores[ours + name] = value if value >= 0 else float("nan")  # -1: nothing to score
        return scores

    def _per_class(self, found: Mapping[str, Tensor], theirs: str, ours: str, rows: list[dict[str, Any]]) -> None:
        precision = found.get(f"{theirs}precision")  # (thresholds, recalls, classes, areas, numbers of detections)
        for row in rows:
            row[f"{ours}map"] = row[f"{ours}map_50"] = float("nan")
        if precision is None:
            return
        for place, label in enumerate(found["classes"].reshape(-1).tolist()):
            of_class = precision[:, :, place, 0, -1]
            for name, some in (("map", of_class), ("map_50", of_class[:1])):
                if (some > -1).any():
                    rows[label][ours + name] = float(some[some > -1].mean())


def names(max_detections: Sequence[int] = (1, 10, 100)) -> list[str]:
    """The names of COCO's scores with these numbers of detections."""
    ours = iter(max_detections)
    return [f"mar_{next(ours)}" if name in ("mar_1", "mar_10", "mar_100") else name for name in COCO_SCORES]


def score_names(with_masks: bool, max_detections: Sequence[int], box_as_mask: bool, voc: bool) -> tuple[str, ...]:
    """All names that `DetectionMetrics.compute` gives with these arguments."""
    plain = names(max_detections)
    found = [*plain, *(f"mask_{name}" for name in plain if with_masks)]
    if with_masks and box_as_mask:
        found += [f"box_as_mask_{name}" for name in plain if name.startswith("map")]
    return (*found, "voc_map_50") if voc else tuple(found)


def conventions(with_masks: bool, voc: bool) -> str:
    """What the numbers mean, in words."""
    return CONVENTIONS + (MASK_CONVENTIONS if with_masks else "") + (VOC_CONVENTIONS if voc else "")
