"""Sliding windows: where they stand, and how their maps become one."""

from collections.abc import Iterable, Sequence

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


def cover(size: Size, boxes: Sequence[Box], device: torch.device) -> Tensor:
    """How many windows cover each pixel, (*size) float32; all pixels must be covered."""
    count = torch.zeros(size, device=device)
    for top, left, bottom, right in boxes:
        count[top:bottom, left:right] += 1
    assert bool((count > 0).all()), "the windows do not cover the image"
    return count


def average(placed: Iterable[tuple[Box, Tensor]], count: Tensor) -> Tensor:
    """The mean of overlapping windows, each pixel divided by the number of windows that cover it.

    Sums are kept in float32 at least: a sum of many bfloat16 logits would lose its last digits.

    Args:
        placed: windows and their maps (K, bottom - top, right - left), one after the other.
        count: what `cover` gives for them.

    Returns:
        (K, *size).
    """
    total: Tensor | None = None
    for (top, left, bottom, right), map in placed:
        assert map.shape[-2:] == (bottom - top, right - left), f"{tuple(map.shape)} for {(top, left, bottom, right)}"
        if total is None:
            dtype = torch.promote_types(map.dtype, torch.float32)
            total = torch.zeros((len(map), *count.shape), dtype=dtype, device=map.device)
        total[:, top:bottom, left:right] += map
    assert total is not None, "no window"
    return total.div_(count)


def _spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Starts and ends of the windows along one dimension."""
    assert length >= 1, length
    if length <= window:
        return [(0, length)]
    steps = -(-(length - window) // stride)  # rounded up: the last window ends at the border
    starts = [min(step * stride, length - window) for step in range(steps + 1)]
    return [(start, start + window) for start in starts]
