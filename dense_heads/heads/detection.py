"""The contract of a detection head, and where its boxes stand.

A detection head wraps parts that bring their own matching and losses. It works in the *frame* of the patch grid: the
image as the backbone saw it, after padding (or resizing) to whole patches. Batches and results speak of images; the
functions here go between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from dense_heads.heads.base import Head
from dense_heads.structures import Batch, Detection, Features, Size

PATCH_SIZE = 14  # pixels; strides of pyramids and anchors follow from it


class DetectionHead(Head):
    """Features of a frozen backbone -> losses in training, objects in use.

    `terms` names what `losses` gives; a task may weight them. `has_masks`: it learns and finds masks.
    """

    terms: tuple[str, ...] = ()
    has_masks: bool = False

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Scalar loss terms by name.

        Args:
            features: of a batch of B images of one size.
            batch: `boxes`, `labels` (lists of B, in pixels of the image), `instance_masks` where the head needs them.
        """
        raise NotImplementedError

    def detect(self, features: Features, sizes: Sequence[Size]) -> list[Detection]:
        """The objects of each image, best first.

        Args:
            features: of a batch of B images of one size.
            sizes: for each image the (height, width) that its boxes are wanted at, usually its own size on disk.

        Returns:
            For each image `boxes` (n, 4) xyxy in pixels of that size, `scores` (n,), `labels` (n,) from 0; heads with
            masks also `masks` (n, M, M): probabilities inside the boxes (`ops/masks.py` brings them to pixels).
        """
        raise NotImplementedError

    def forward(self, features: Features) -> Tensor:
        """A detection head gives no map.

        Raises:
            TypeError: always; see `losses` and `detect`.
        """
        raise TypeError("a detection head has losses() and detect() in place of a map")


@dataclass(frozen=True)
class Frame:
    """The patch grid's pixels, and the image within them."""

    size: Size  # (height, width) of the grid in pixels
    image_size: Size
    left: float  # of the image in the grid, pixels of the grid
    top: float
    scale: tuple[float, float]  # (x, y) grid pixels for one image pixel; 1 where the image was padded

    @classmethod
    def of(cls, features: Features) -> "Frame":
        """From what the backbone says about its image."""
        rows, columns = features.patch_maps[0].shape[-2:]
        size, padding = (int(rows) * PATCH_SIZE, int(columns) * PATCH_SIZE), features.padding
        height, width = features.image_size
        inner = (size[0] - padding.top - padding.bottom, size[1] - padding.left - padding.right)
        return cls(size, features.image_size, padding.left, padding.top, (inner[1] / width, inner[0] / height))

    def enter(self, boxes: Tensor) -> Tensor:
        """Boxes (n, 4) in pixels of the image -> of the grid."""
        return boxes * self._scales(boxes) + self._offsets(boxes)

    def leave(self, boxes: Tensor, size: Size) -> Tensor:
        """Boxes (n, 4) in pixels of the grid -> of the image at (height, width) = `size`, cut at its borders."""
        own = (boxes - self._offsets(boxes)) / self._scales(boxes)
        height, width = self.image_size
        wanted = own.new_tensor([size[1] / width, size[0] / height] * 2)
        inside: Tensor = clip_boxes_to_image(own * wanted, size)
        return inside

    def enter_masks(self, masks: Tensor) -> Tensor:
        """Masks (n, H, W) at the image's pixels -> at the grid's, float32 (soft where it was resized)."""
        if self.scale != (1.0, 1.0):
            return F.interpolate(masks[None].float(), self.size, mode="bilinear")[0]
        height, width = masks.shape[-2:]
        left, top = int(self.left), int(self.top)
        sides = (left, self.size[1] - width - left, top, self.size[0] - height - top)
        return F.pad(masks.float(), sides)

    def _scales(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.scale * 2)

    def _offsets(self, like: Tensor) -> Tensor:
        return like.new_tensor([self.left, self.top] * 2)


def finished(found: Sequence[Detection], features: Features, sizes: Sequence[Size]) -> list[Detection]:
    """Objects in the frame of the grid -> in each image's own pixels; what lies in the padding alone is dropped."""
    frame = Frame.of(features)
    results = []
    for one, size in zip(found, sizes, strict=True):
        moved = {**one, "boxes": frame.leave(one["boxes"], size)}
        inside = (moved["boxes"][:, 2:] > moved["boxes"][:, :2]).all(dim=1)
        results.append({name: tensor[inside] for name, tensor in moved.items()})
    return results


def targets(features: Features, batch: Batch, first_label: int = 0) -> list[dict[str, Tensor]]:
    """What is to be found in each image, in the frame of the grid, by the names of torchvision's detectors.

    `first_label` is added to labels: 1 where 0 is the background. Boxes float32; `masks` where the batch has them.
    """
    frame = Frame.of(features)
    found = []
    for index, (boxes, labels) in enumerate(zip(batch["boxes"], batch["labels"], strict=True)):
        target = {"boxes": frame.enter(boxes.float()), "labels": labels + first_label}
        if "instance_masks" in batch:
            target["masks"] = frame.enter_masks(batch["instance_masks"][index])
        found.append(target)
    return found
