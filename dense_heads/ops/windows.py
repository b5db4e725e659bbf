"""Sliding windows: where they stand, and how their maps become one."""

import torch
from torch import Tensor

from dense_heads.structures import Size

Box = tuple[int, int, int, int]  # top, left, bottom, right in pixels, the last two exclusive


def window_boxes(size: Size, window: int, stride: int) -> list[Box]:
    """The windows of one image, row by row.

    As mmseg's slide inference: a regular grid whose last row and column are shifted back inside the image, so that
    every window is full; an image smaller than the window in a dimension is used whole there.

    Args:
        size: (height, width) of the image in pixels.
        window: side of the square window in pixels.
        stride: pixels from one window to the next, at most `window` (a larger one would leave pixels out).
    """
    assert 1 <= stride <= window, (window, stride)
    rows, columns = (_spans(length, window, stride) for length in size)
    return [(top, left, bottom, right) for top, bottom in rows for left, right in columns]


class WindowAverage:
    """The mean over overlapping windows of one image, each pixel divided by the number of windows that cover it.

    Sums are kept in float32 at least: a sum of many bfloat16 logits would lose its last digits.
    """

    def __init__(self, size: Size) -> None:
        """`size`: (height, width) of the image in pixels."""
        self.size = size
        self.total: Tensor | None = None  # (K, H, W), made when K, dtype and device are known
        self.count: Tensor | None = None  # (H, W)

    def add(self, box: Box, map: Tensor) -> None:
        """Add a window's map (K, bottom - top, right - left)."""
        top, left, bottom, right = box
        assert map.shape[-2:] == (bottom - top, right - left), f"map {tuple(map.shape)} for window {box}"
        if self.total is None or self.count is None:
            dtype = torch.promote_types(map.dtype, torch.float32)
            self.total = torch.zeros((map.shape[0], *self.size), dtype=dtype, device=map.device)
            self.count = torch.zeros(self.size, dtype=dtype, device=map.device)
        self.total[:, top:bottom, left:right] += map
        self.count[top:bottom, left:right] += 1

    def mean(self) -> Tensor:
        """(K, H, W); the windows added so far must cover the image. The sum's memory is used: call it once."""
        assert self.total is not None and self.count is not None, "no window was added"
        assert bool((self.count > 0).all()), "the windows do not cover the image"
        return self.total.div_(self.count)


def _spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Starts and ends of the windows along one dimension."""
    assert length >= 1, length
    if length <= window:
        return [(0, length)]
    steps = -(-(length - window) // stride)  # rounded up: the last window ends at the border
    starts = [min(step * stride, length - window) for step in range(steps + 1)]
    return [(start, start + window) for start in starts]
