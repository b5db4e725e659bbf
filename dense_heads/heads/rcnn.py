"""Faster R-CNN and Mask R-CNN on a simple feature pyramid (Ren et al. 2015, He et al. 2017; torchvision's parts)."""

from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from dense_heads.heads.detection import DetectionHead, Frame, finished, targets
from dense_heads.heads.pyramid import STRIDES, PyramidAnchors, PyramidRoIAlign, SimplePyramid
from dense_heads.structures import Batch, Detection, Features, Size


class RCNNDetector(DetectionHead):
    """Proposals from anchors on every level, then a class, a better box, and on request a mask for each proposal.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: classes, without the background.
        blocks, norm: see Head.
        channels: width of the pyramid.
        hidden: width of the two layers that look at a pooled proposal.
        mask_channels: width of the four convolutions that draw masks of 28 x 28 (Mask R-CNN; training then needs
            `instance_masks`); None finds boxes alone (Faster R-CNN).
        strides: of the pyramid.
        anchor_scale: side of a level's anchors, in its strides.
        anchor_ratios: height / width of the anchors.
        proposals: at most so many for an image, in training and in use.
        samples: proposals of an image that training looks at, a quarter of them on objects.
        score_thresh: detections below are dropped.
        nms_thresh: IoU from which the lower of two boxes of a class is dropped.
        detections: at most so many for an image.
    """

    terms: tuple[str, ...] = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        channels: int = 128,
        hidden: int = 512,
        mask_channels: int | None = None,
        strides: Sequence[int] = STRIDES,
        anchor_scale: float = 4.0,
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        proposals: int = 500,
        samples: int = 128,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections: int = 100,
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        pool = PyramidRoIAlign(7, strides)
        self.rcnn = FasterRCNN(
            SimplePyramid(in_channels, channels, strides),
            rpn_anchor_generator=PyramidAnchors(
                [[anchor_scale * stride] for stride in strides], anchor_ratios, strides
            ),
            rpn_pre_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=2 * proposals,
            rpn_post_nms_top_n_train=proposals,
            rpn_post_nms_top_n_test=proposals,
            box_roi_pool=pool,
            box_head=TwoMLPHead(channels * pool.output_size[0] ** 2, hidden),
            box_predictor=FastRCNNPredictor(hidden, num_outputs + 1),
            box_batch_size_per_image=samples,
            box_score_thresh=score_thresh,
            box_nms_thresh=nms_thresh,
            box_detections_per_img=detections,
        )
        self.has_masks = mask_channels is not None
        if mask_channels is not None:
            self.terms = (*self.terms, "loss_mask")
            self.rcnn.roi_heads.mask_roi_pool = PyramidRoIAlign(14, strides)
            self.rcnn.roi_heads.mask_head = MaskRCNNHeads(channels, (mask_channels,) * 4, dilation=1)
            self.rcnn.roi_heads.mask_predictor = MaskRCNNPredictor(mask_channels, mask_channels, num_outputs + 1)

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Of the proposals: object or not, box; of the sampled ones: class, box, and mask of those on objects."""
        levels, images = self._look(features)
        wanted = targets(features, batch, first_label=1)
        proposals, losses = self.rcnn.rpn(images, levels, wanted)
        _, more = self.rcnn.roi_heads(levels, proposals, images.image_sizes, wanted)
        return {**losses, **more}

    def detect(self, features: Features, sizes: Sequence[Size]) -> list[Detection]:
        """See DetectionHead."""
        levels, images = self._look(features)
        proposals, _ = self.rcnn.rpn(images, levels)
        found, _ = self.rcnn.roi_heads(levels, proposals, images.image_sizes)
        for one in found:
            one["labels"] = one["labels"] - 1  # 0 is the background
            if "masks" in one:
                one["masks"] = one["masks"][:, 0]
        return finished(found, features, sizes)

    def _look(self, features: Features) -> tuple[dict[str, Tensor], ImageList]:
        """The pyramid, and the images as torchvision's parts want to know them: by their sizes."""
        levels: dict[str, Tensor] = self.rcnn.backbone(features)
        first = next(iter(levels.values()))
        return levels, ImageList(first, [Frame.of(features).size] * len(first))
