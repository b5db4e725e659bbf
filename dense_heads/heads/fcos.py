"""FCOS on a simple feature pyramid (Tian et al., ICCV 2019; torchvision's parts)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.fcos import FCOSHead as Towers
from torchvision.models.detection.image_list import ImageList

from dense_heads.errors import UserError
from dense_heads.heads.detection import DetectionHead, Frame, finished, targets
from dense_heads.heads.pyramid import STRIDES, PyramidAnchors, SimplePyramid
from dense_heads.structures import Batch, Detection, Features, Size


class FCOSDetector(DetectionHead):
    """One object or none at each place of each level: class, distances to the four sides, centre-ness.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: classes.
        blocks, norm: see Head.
        channels: width of pyramid and towers, a multiple of 32 (group normalisation).
        num_convs: 3 x 3 convolutions of each of the two towers.
        strides: of the pyramid.
        score_thresh: detections below are dropped; the score is the root of class probability times centre-ness.
        nms_thresh: IoU from which the lower of two boxes of a class is dropped.
        detections: at most so many for an image.
        candidates: at most so many of each level before NMS.

    Raises:
        UserError: a width that group normalisation cannot take.
    """

    terms = ("classification", "bbox_regression", "bbox_ctrness")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        channels: int = 128,
        num_convs: int = 2,
        strides: Sequence[int] = STRIDES,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.6,
        detections: int = 100,
        candidates: int = 1000,
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if channels < 32 or channels % 32:
            raise UserError(f"head.channels={channels}; expected a multiple of 32.")
        self.fcos = FCOS(
            SimplePyramid(in_channels, channels, strides),
            num_classes=num_outputs,
            anchor_generator=PyramidAnchors([[stride] for stride in strides], [1.0], strides),
            head=Towers(channels, 1, num_outputs, num_convs),
            score_thresh=score_thresh,
            nms_thresh=nms_thresh,
            detections_per_img=detections,
            topk_candidates=candidates,
        )

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Focal loss of the classes, GIoU of the boxes, cross-entropy of the centre-ness."""
        outputs, anchors, nums = self._look(features)
        losses: dict[str, Tensor] = self.fcos.compute_loss(targets(features, batch), outputs, anchors, nums)
        return losses

    def detect(self, features: Features, sizes: Sequence[Size]) -> list[Detection]:
        """See DetectionHead."""
        outputs, anchors, nums = self._look(features)
        found = self.fcos.postprocess_detections(
            {name: list(torch.split(output, nums, dim=1)) for name, output in outputs.items()},
            [list(torch.split(own, nums)) for own in anchors],
            [Frame.of(features).size] * len(sizes),
        )
        return finished(found, features, sizes)

    def _look(self, features: Features) -> tuple[dict[str, Tensor], list[Tensor], list[int]]:
        """Outputs of the towers, anchors of each image, number of anchors of each level."""
        levels = list(self.fcos.backbone(features).values())
        grid = Frame.of(features).size
        anchors = self.fcos.anchor_generator(ImageList(levels[0], [grid] * len(levels[0])), levels)
        return self.fcos.head(levels), anchors, [level.shape[-2] * level.shape[-1] for level in levels]
