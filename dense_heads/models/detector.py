"""A model that finds objects: whole images, or windows, scales and mirror images whose boxes are merged."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from dense_heads.data.detection_transforms import DetectionEvalTransform
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.heads.detection import DetectionHead
from dense_heads.models.card import Card
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.models.inference import Inference, crop, together, view_size
from dense_heads.ops import masks
from dense_heads.ops.windows import Box
from dense_heads.structures import Detection, Levels, SeenView, Size, View

_TOUCH = 1.0  # pixels: a box this near to a window's border reaches it


@dataclass(frozen=True)
class DetectionInference(Inference):
    """How an image is looked at for objects.

    Args:
        window, stride, flip, window_batch: as for Inference; a window is in pixels of the image as the model sees it.
        merge_iou: where an image is looked at more than once: IoU from which the lower of two boxes of a class, from
            whatever look, is dropped.
        detections: at most so many for an image after merging.

    Raises:
        UserError: a value that makes no sense.
    """

    merge_iou: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        """Refuse values that would fail in the middle of a run."""
        super().__post_init__()
        if not 0 < self.merge_iou <= 1 or self.detections < 1:
            raise UserError(
                f"merge_iou={self.merge_iou}, detections={self.detections}; expected an IoU above 0, at most 1, and at "
                "least one detection."
            )


class _Look(NamedTuple):
    """A window of one view of one image, straight or mirrored."""

    image: int
    view: View
    box: Box
    flip: bool
    number: int  # among the windows of its view

    def content(self) -> Tensor | Levels:
        """The pixels (C, h, w), or their features."""
        if isinstance(self.view, SeenView):
            return self.view.windows[self.number]
        return crop(self.view, self.box, self.flip)

    @property
    def size(self) -> Size:
        top, left, bottom, right = self.box
        return bottom - top, right - left


def detections(
    backbone: FrozenBackbone,
    heads: Sequence[DetectionHead],
    views: Sequence[Sequence[View]],
    sizes: Sequence[Size],
    how: DetectionInference,
) -> list[list[Detection]]:
    """For each head and image its objects, in pixels of the image at its size in `sizes`.

    Windows of equal size share a pass, whichever image they come from; nothing is padded to another one's size, so an
    image is seen alike alone and among others.
    """
    requests = [backbone.request(head) for head in heads]
    looks = [
        _Look(image, view, box, flip, number)
        for image, image_views in enumerate(views)
        for view in image_views
        for number, (box, flip) in enumerate(how.windows(view_size(view)))
    ]
    found: list[list[list[Detection]]] = [[[] for _ in views] for _ in heads]
    waiting: dict[Size, list[_Look]] = defaultdict(list)

    def forward(group: list[_Look]) -> None:
        seen = together([look.content() for look in group])
        levels = (seen if isinstance(seen, Levels) else backbone(seen, requests)).float()
        for own, head, request in zip(found, heads, requests, strict=True):
            for look, one in zip(group, head.detect(levels.features(request), [x.size for x in group]), strict=True):
                overlap = 0 if how.window is None else how.window - how.step
                own[look.image].append(_placed(one, look, sizes[look.image], overlap))

    for look in looks:  # a group goes as soon as it is full
        group = waiting[look.size]
        group.append(look)
        if len(group) == how.window_batch:
            forward(waiting.pop(look.size))
    for group in waiting.values():
        forward(group)
    return [[_merged(parts, how) for parts in images] for images in found]


def _placed(found: Detection, look: _Look, size: Size, overlap: int) -> Detection:
    """Objects of a window, in pixels of the whole image at (height, width) = `size`.

    What reaches a border inside the image and is shorter, across it, than the windows overlap, stands whole in the
    neighbouring window: it is dropped here.
    """
    top, left, bottom, right = look.box
    height, width = view_size(look.view)
    boxes = found["boxes"]
    if look.flip:
        boxes = torch.stack([right - left - boxes[:, 2], boxes[:, 1], right - left - boxes[:, 0], boxes[:, 3]], dim=1)
    boxes = boxes + boxes.new_tensor([left, top, left, top])
    across, down = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    cut = torch.zeros_like(across, dtype=torch.bool)
    if left > 0:
        cut |= (boxes[:, 0] < left + _TOUCH) & (across < overlap)
    if top > 0:
        cut |= (boxes[:, 1] < top + _TOUCH) & (down < overlap)
    if right < width:
        cut |= (boxes[:, 2] > right - _TOUCH) & (across < overlap)
    if bottom < height:
        cut |= (boxes[:, 3] > bottom - _TOUCH) & (down < overlap)
    placed = {**found, "boxes": boxes * boxes.new_tensor([size[1] / width, size[0] / height] * 2)}
    if look.flip and "masks" in found:
        placed["masks"] = found["masks"].flip(-1)
    return {name: tensor[~cut] for name, tensor in placed.items()}


def _merged(parts: Sequence[Detection], how: DetectionInference) -> Detection:
    """The objects of all looks at one image as one list, best first."""
    if len(parts) == 1:
        return parts[0]
    every = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    keep = batched_nms(every["boxes"], every["scores"], every["labels"], how.merge_iou)[: how.detections]
    return {name: tensor[keep] for name, tensor in every.items()}


def check_head(head: Head) -> DetectionHead:
    """The head, if it finds objects.

    Raises:
        UserError: it does something else.
    """
    if not isinstance(head, DetectionHead):
        raise UserError(
            f"{type(head).__name__} predicts maps; expected a head that finds objects: head=fcos, "
            "faster_rcnn, mask_rcnn or plain_detr."
        )
    return head


class Detector(DenseModel):
    """Finds objects: boxes, scores, labels, and masks where its head has them."""

    transform_type = DetectionEvalTransform
    inference_type = DetectionInference
    head: DetectionHead
    inference: DetectionInference

    def __init__(self, backbone: FrozenBackbone, head: Head, card: Card) -> None:
        super().__init__(check_fit(backbone), check_head(head), card)

    def forward(self, images: Tensor) -> list[Detection]:  # type: ignore[override]
        """(B, C, H, W) normalised -> the objects of each image at the batch's own size."""
        size = (int(images.shape[-2]), int(images.shape[-1]))
        return detections(self.backbone, [self.head], [[x] for x in images], [size] * len(images), self.inference)[0]

    def decode(self, views: Sequence[View], size: Size) -> Detection:  # type: ignore[override]
        """The objects of one image at `size`, from its normalised test views."""
        return detections(self.backbone, [self.head], [views], [size], self.inference)[0][0]

    def predict(self, image: Any) -> dict[str, np.ndarray]:  # type: ignore[override]
        """The objects of an image, in pixels of its own size.

        `image`: a path, a PIL image, a uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W).

        Returns:
            `boxes` (n, 4) float32 xyxy, `scores` (n,) float32, `labels` (n,) int64 from 0, best first; of heads with
            masks also `masks` (n, H, W) bool.

        Raises:
            UserError: the image cannot be read.
        """
        found, size = self._decoded(image)
        result: dict[str, np.ndarray] = {name: found[name].cpu().numpy() for name in ("boxes", "scores", "labels")}
        if "masks" in found:
            whole = list(masks.pasted(found["masks"], found["boxes"], size))
            result["masks"] = np.stack(whole) if whole else np.zeros((0, *size), dtype=bool)
        return result


def check_fit(backbone: FrozenBackbone) -> FrozenBackbone:
    """The backbone, if every pixel of an image can have a box.

    Raises:
        UserError: it cuts the border off.
    """
    if backbone.patch_fit == "crop":
        raise UserError("backbone.patch_fit=crop cuts off the border, with its objects. Use pad, pad_exact or resize.")
    return backbone
