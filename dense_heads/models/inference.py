"""Whole-image, sliding-window and test-time-augmented inference over images of any sizes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.models.looks import Look, Window
from dense_heads.ops.pad import Placement
from dense_heads.ops.windows import Box, window_boxes
from dense_heads.structures import Levels, SeenView, Size, View

Predict = Callable[[Tensor | Levels], tuple[list[Tensor], Placement]]


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
    finish: Callable[[Sequence[Look]], Tensor],
) -> list[list[Tensor]]:
    """Predict every image, for every candidate head at once.

    In mmseg 0.27's order, which DINOv2's published numbers were measured in: windows of a view -> logits averaged by
    count -> resized to the image's own size -> softmax (none for depth) -> un-flipped -> mean over views and flips.
    Windows of equal size share a batch, whichever image, view or flip they come from; nothing is padded to anything
    else's size.

    What is kept of a window is the head's map at its own resolution, until its image is complete.

    Args:
        predict: normalised crops (b, C, h, w) of equal size, or their features -> for each candidate its map
            (b, K, h', w') at whatever resolution, and how such a map lies on the crops' pixels.
        views: for each image its test scales, each (C, h, w) normalised or already seen by the backbone; one where
            there is no multi-scale testing.
        sizes: for each image the (height, width) of the result, usually the label's.
        settings: windows, flip, batch.
        finish: what becomes of all looks at an image: `most_probable` or `mean` of `models/looks.py`.

    Returns:
        `result[candidate][image]`: what `finish` gives.
    """
    assert len(views) == len(sizes) and all(views), "every image needs a size and at least one view"
    glances = [[glance for view in image_views for glance in _glances(view, settings)] for image_views in views]
    missing = [sum(len(glance.boxes) for glance in of_image) for of_image in glances]
    results: list[list[Tensor | None]] = []  # candidate x image

    def forward(group: list[_Window]) -> None:
        maps, placement = predict(together([window.content() for window in group]))
        if not results:
            results.extend([None] * len(views) for _ in maps)
        assert len(maps) == len(results), f"{len(maps)} candidates, {len(results)} before"
        for index, window in enumerate(group):
            window.glance.add([Window(window.box, candidate[index], placement) for candidate in maps])
            missing[window.image] -= 1
            if missing[window.image] == 0:
                for candidate, of_candidate in enumerate(results):
                    looks = [glance.look(candidate, sizes[window.image]) for glance in glances[window.image]]
                    of_candidate[window.image] = finish(looks)
                glances[window.image] = []  # its maps are not needed any more

    # A group goes as soon as it is full, so windows wait only for others of their own size.
    waiting: dict[tuple[int, ...], list[_Window]] = defaultdict(list)
    for image, of_image in enumerate(glances):
        for window in _windows(image, of_image):
            group = waiting[window.shape]
            group.append(window)
            if len(group) == settings.window_batch:
                forward(waiting.pop(window.shape))
    for group in waiting.values():
        forward(group)

    return [[_finished(result) for result in of_candidate] for of_candidate in results]


@dataclass
class _Glance:
    """One view, straight or mirrored, and what the candidates have said of its windows so far."""

    view: View
    flip: bool
    boxes: list[tuple[int, Box]]  # number among the windows of the view, and place
    said: list[list[Window]] = field(default_factory=list)  # window x candidate

    def add(self, said: list[Window]) -> None:
        """The next window, which is of the same size as all others and so comes in order."""
        self.said.append(said)

    def look(self, candidate: int, size: Size) -> Look:
        """What one candidate says."""
        return Look(view_size(self.view), self.flip, size, [said[candidate] for said in self.said])


@dataclass(frozen=True)
class _Window:
    """A window that waits for its forward pass; it holds no pixels of its own until then."""

    image: int
    glance: _Glance
    box: Box
    index: int  # among the windows of its view, flipped ones after the others

    @property
    def shape(self) -> tuple[int, ...]:
        top, left, bottom, right = self.box
        return (bottom - top, right - left)

    def content(self) -> Tensor | Levels:
        """The window's pixels (C, h, w), or its features."""
        view = self.glance.view
        return view.windows[self.index] if isinstance(view, SeenView) else crop(view, self.box, self.glance.flip)


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


def _glances(view: View, settings: Inference) -> list[_Glance]:
    """A view straight and, where asked for, mirrored."""
    windows = list(enumerate(settings.windows(view_size(view))))
    flips = (False, True) if settings.flip else (False,)
    return [_Glance(view, flip, [(index, box) for index, (box, own) in windows if own == flip]) for flip in flips]


def _windows(image: int, glances: Sequence[_Glance]) -> Iterator[_Window]:
    """Every window of an image, in the order in which it is looked at."""
    for glance in glances:
        yield from (_Window(image, glance, box, index) for index, box in glance.boxes)


def together(contents: Sequence[Tensor | Levels]) -> Tensor | Levels:
    """Equal windows as one batch."""
    tensors = [content for content in contents if isinstance(content, Tensor)]
    if len(tensors) == len(contents):
        return torch.stack(tensors)
    assert not tensors, "pixels and features in one batch"
    return Levels.cat([content for content in contents if isinstance(content, Levels)])


def _finished(result: Tensor | None) -> Tensor:
    assert result is not None, "an image was never finished"
    return result


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
