"""Whole-image, sliding-window and test-time-augmented inference over images of any sizes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.ops.resize import resize
from dense_heads.ops.windows import Box, WindowAverage, window_boxes
from dense_heads.structures import Levels, SeenView, Size, View

Predict = Callable[[Tensor | Levels], list[Tensor]]


@dataclass(frozen=True)
class Inference:
    """How an image is looked at.

    Args:
        window: side of the square sliding window in pixels; None looks at whole images (`stride` is then not used).
        stride: pixels from one window to the next, 1 to `window`; None takes two thirds of the window (512 -> 341,
            as published).
        flip: also look at the mirror image of every view, and average.
        window_batch: at most so many windows in one forward pass; memory grows with it, numbers do not change.

    Raises:
        UserError: a value that makes no sense.
    """

    window: int | None = None
    stride: int | None = None
    flip: bool = False
    window_batch: int = 8

    def __post_init__(self) -> None:
        """Refuse values that would fail, or leave pixels out, in the middle of a run."""
        if not isinstance(self.flip, bool):
            raise UserError(f"flip={self.flip!r}: expected true or false.")
        if not _positive(self.window_batch):
            raise UserError(f"window_batch={self.window_batch!r}: expected a whole number of windows, at least 1.")
        if self.window is None:
            return
        if not _positive(self.window):
            raise UserError(
                f"window={self.window!r}: expected a number of pixels, at least 1, or null for whole-image inference."
            )
        if self.stride is not None and not (_positive(self.stride) and self.stride <= self.window):
            raise UserError(
                f"stride={self.stride!r} with window={self.window}: expected a whole number of pixels from 1 to "
                f"{self.window} (a larger stride would leave pixels out), or null for two thirds of the window. For "
                "whole-image inference set window=null."
            )

    def boxes(self, size: Size) -> list[Box]:
        """The windows of an image of (height, width) pixels."""
        if self.window is None:
            return [(0, 0, *size)]
        return window_boxes(size, self.window, self.step)

    @property
    def step(self) -> int:
        """Pixels from one window to the next."""
        assert self.window is not None
        return max(1, 2 * self.window // 3) if self.stride is None else self.stride

    def windows(self, size: Size) -> list[tuple[Box, bool]]:
        """(window, mirrored or not) of an image of (height, width) pixels, in the order in which it is looked at."""
        return [(box, flip) for flip in ((False, True) if self.flip else (False,)) for box in self.boxes(size)]


def infer(
    predict: Predict,
    views: Sequence[Sequence[View]],
    sizes: Sequence[Size],
    settings: Inference,
    activate: Callable[[Tensor], Tensor],
) -> list[list[Tensor]]:
    """Predict every image, for every candidate head at once.

    In mmseg 0.27's order, which DINOv2's published numbers were measured in: windows of a view -> logits averaged by
    count -> resized to the image's own size -> activated -> un-flipped -> mean over views and flips. Windows of equal
    size share a batch, whichever image, view or flip they come from; nothing is padded to anything else's size.

    Only views that are being worked on hold a map at their own size; what stays is one (K, H, W) for each image.

    Args:
        predict: normalised crops (b, C, h, w) of equal size, or their features -> for each candidate (b, K, h, w), at
            the crops' pixels.
        views: for each image its test scales, each (C, h, w) normalised or already seen by the backbone; one where
            there is no multi-scale testing.
        sizes: for each image the (height, width) of the result, usually the label's.
        settings: windows, flip, batch.
        activate: (K, H, W) logits -> what is averaged over views: softmax over the first dimension for segmentation,
            the identity for depth.

    Returns:
        `result[candidate][image]`, (K, H, W) at that image's size, float32 at least.
    """
    assert len(views) == len(sizes) and all(views), "every image needs a size and at least one view"
    results: list[list[Tensor | None]] = []  # candidate x image: sum over views and flips
    num_looks = [len(image_views) * (2 if settings.flip else 1) for image_views in views]

    def finish(look: _Look) -> None:
        for sums, average in zip(results, look.averages, strict=True):
            scored = activate(resize(average.mean()[None], sizes[look.image])[0])
            scored = scored.flip(-1) if look.flip else scored
            before = sums[look.image]
            sums[look.image] = scored if before is None else before + scored
        look.averages.clear()  # the view's own map is not needed any more

    def forward(group: list[_Window]) -> None:
        maps = predict(together([window.content() for window in group]))
        if not results:
            results.extend([None] * len(views) for _ in maps)
        assert len(maps) == len(results), f"{len(maps)} candidates, {len(results)} before"
        for index, window in enumerate(group):
            if window.look.add(window.box, [candidate[index] for candidate in maps]):
                finish(window.look)

    # A group goes as soon as it is full, so windows wait only for others of their own size.
    waiting: dict[tuple[int, ...], list[_Window]] = defaultdict(list)
    for window in _windows(views, settings):
        group = waiting[window.shape]
        group.append(window)
        if len(group) == settings.window_batch:
            forward(waiting.pop(window.shape))
    for group in waiting.values():
        forward(group)

    return [[_divided(total, num) for total, num in zip(sums, num_looks, strict=True)] for sums in results]


class _Look:
    """One view of one image, straight or flipped, and what has been predicted of it."""

    def __init__(self, image: int, view: View, flip: bool, num_windows: int) -> None:
        self.image, self.view, self.flip, self.missing = image, view, flip, num_windows
        self.size = view_size(view)
        self.averages: list[WindowAverage] = []  # one for each candidate, made with the first prediction

    def add(self, box: Box, maps: list[Tensor]) -> bool:
        """Add a window's map of each candidate; True when it was the last window."""
        if not self.averages:
            self.averages = [WindowAverage(self.size) for _ in maps]
        for average, map in zip(self.averages, maps, strict=True):
            average.add(box, map)
        self.missing -= 1
        return self.missing == 0


@dataclass(frozen=True)
class _Window:
    """A window that waits for its forward pass; it holds no pixels of its own until then."""

    look: _Look
    box: Box
    index: int  # among the windows of its view, flipped ones after the others

    @property
    def shape(self) -> tuple[int, ...]:
        top, left, bottom, right = self.box
        return (bottom - top, right - left)

    def content(self) -> Tensor | Levels:
        """The window's pixels (C, h, w), or its features."""
        view = self.look.view
        return view.windows[self.index] if isinstance(view, SeenView) else crop(view, self.box, self.look.flip)


def view_size(view: View) -> Size:
    """(height, width) of a view."""
    return view.size if isinstance(view, SeenView) else (int(view.shape[-2]), int(view.shape[-1]))


def crop(view: Tensor, box: Box, flip: bool) -> Tensor:
    """A window (C, h, w). One of the mirror image is the mirror of the window at the other side."""
    top, left, bottom, right = box
    if not flip:
        return view[:, top:bottom, left:right]
    width = view.shape[-1]
    return view[:, top:bottom, width - right : width - left].flip(-1)


def _windows(views: Sequence[Sequence[View]], settings: Inference) -> Iterator[_Window]:
    """Every window of every view of every image, image by image."""
    for image, image_views in enumerate(views):
        for view in image_views:
            windows = settings.windows(view_size(view))
            nums = Counter(flip for _, flip in windows)
            looks = {flip: _Look(image, view, flip, num) for flip, num in nums.items()}
            yield from (_Window(looks[flip], box, index) for index, (box, flip) in enumerate(windows))


def together(contents: Sequence[Tensor | Levels]) -> Tensor | Levels:
    """Equal windows as one batch."""
    tensors = [content for content in contents if isinstance(content, Tensor)]
    if len(tensors) == len(contents):
        return torch.stack(tensors)
    assert not tensors, "pixels and features in one batch"
    return Levels.cat([content for content in contents if isinstance(content, Levels)])


def _divided(total: Tensor | None, num: int) -> Tensor:
    assert total is not None, "an image was never finished"
    return total / num if num > 1 else total


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
