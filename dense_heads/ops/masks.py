"""Instance masks: run lengths in COCO's compressed form, and a detector's small masks brought to an image's pixels.

A mask on disk or in a metric is its run-length code, a short string: a thousand masks of a large image would not fit
into memory as pixels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dense_heads.structures import Size

Mask = NDArray[np.bool_]  # (H, W)

_PIXELS_AT_ONCE = 2**26  # of pasted masks; as float32 a quarter of a gigabyte


def encode(mask: NDArray[Any]) -> str:
    """(H, W), 0 or not -> compressed run-length code, column by column as COCO has it."""
    counts: bytes = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]
    return counts.decode("ascii")


def decode(code: str, size: Size) -> Mask:
    """The inverse of `encode` for a mask of (height, width).

    Raises:
        ValueError: the code is none, or is of another size.
    """
    return np.asarray(coco_mask.decode(to_coco(code, size)), dtype=bool)


def to_coco(code: str, size: Size) -> dict[str, Any]:
    """As COCO's tools take it in memory; in JSON `counts` is the text itself."""
    return {"size": [int(size[0]), int(size[1])], "counts": code.encode("ascii")}


def encode_polygons(polygons: Sequence[Sequence[float]], size: Size) -> str:
    """The union of polygons x1, y1, x2, y2, ... of at least three points, as COCO's tools fill them."""
    parts = coco_mask.frPyObjects([list(map(float, polygon)) for polygon in polygons], *size)
    counts: bytes = coco_mask.merge(parts)["counts"]
    return counts.decode("ascii")


def encode_runs(counts: Sequence[int], size: Size) -> str:
    """Uncompressed run lengths (COCO's crowd regions) -> compressed ones. They must fill the image exactly."""
    packed: bytes = coco_mask.frPyObjects({"size": list(size), "counts": list(counts)}, *size)["counts"]
    return packed.decode("ascii")


def num_pixels(code: str) -> int:
    """Pixels that a code speaks of, in or out: the image's height x width if it is whole. Much quicker than decoding.

    Raises:
        ValueError: it is no code.
    """
    runs: list[int] = []
    value = shift = 0
    for letter in code:
        byte = ord(letter) - 48
        if not 0 <= byte < 64 or shift > 30:
            raise ValueError(f"{letter!r} at a place where no run length has it")
        value |= (byte & 31) << shift
        shift += 5
        if byte & 32:  # more of the same number follows
            continue
        if byte & 16:
            value -= 1 << shift
        if len(runs) > 2:  # from the fourth on, the difference to the last but one
            value += runs[-2]
        if value < 0:
            raise ValueError("a negative run length")
        runs.append(value)
        value = shift = 0
    if shift:
        raise ValueError("cut short")
    return sum(runs)


def area(code: str, size: Size) -> int:
    """Pixels of a mask."""
    return int(coco_mask.area(to_coco(code, size)))


def extent(code: str, size: Size) -> tuple[float, float, float, float]:
    """The box xyxy around a mask; all 0 where it is empty."""
    left, top, width, height = (float(value) for value in coco_mask.toBbox(to_coco(code, size)))
    return left, top, left + width, top + height


def pasted(masks: Tensor, boxes: Tensor, size: Size, threshold: float = 0.5) -> Iterator[Mask]:
    """Masks that fill their boxes, at an image's own pixels, one after the other.

    Args:
        masks: (n, M, M) probabilities inside the boxes.
        boxes: (n, 4) xyxy in pixels of the image.
        size: (height, width) of the image.
        threshold: probability from which a pixel belongs to the object.
    """
    step = max(1, _PIXELS_AT_ONCE // (size[0] * size[1]))
    for start in range(0, len(masks), step):
        some = slice(start, start + step)
        whole = paste_masks_in_image(masks[some, None].float(), boxes[some].float(), size)[:, 0] >= threshold
        yield from whole.cpu().numpy()


def filled_boxes(boxes: Tensor, size: Size) -> Iterator[Mask]:
    """Boxes (n, 4) as masks: pixels whose centre is inside. What a mask head must beat."""
    rows = torch.arange(size[0], device=boxes.device) + 0.5
    columns = torch.arange(size[1], device=boxes.device) + 0.5
    for left, top, right, bottom in boxes:
        inside = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None]
        yield inside.cpu().numpy()
