"""Depth that is predicted without looking at the image: what a score must be read beside."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from dense_heads.data.checks import spread
from dense_heads.data.depth import DepthDataset
from dense_heads.data.depth_transforms import cut
from dense_heads.structures import Size

Depth = npt.NDArray[np.float32]  # (H, W) metres

_MOST_PIXELS = 50_000_000  # of training maps that are held at once, 200 MB
_ROWS = 32  # of all maps that are sorted at once


@dataclass(frozen=True)
class Blind:
    """One depth map for every image."""

    name: str
    depth_m: Depth

    def at(self, size: Size) -> Depth:
        """The map at the size of a label, to the nearest pixel."""
        return _at(self.depth_m, size)


def blind_depths(train: DepthDataset, like: DepthDataset, min_m: float, max_m: float) -> list[Blind]:
    """The median of the training part, the same of each pixel, and the latter weighted by 1 / depth.

    The weighted one is the map with the least abs_rel on the training part that knows nothing of the image: an error
    of 1 m costs more of abs_rel where it is near. A pixel that is measured in no training map takes the median of all.

    Args:
        train: the training part; of a large one maps spread evenly, as many as 50 million pixels hold.
        like: the part that is measured; training maps are cut as its transform cuts.
        min_m: measurements at or below do not count, in metres.
        max_m: those at or above do not count.

    Raises:
        UserError: a map cannot be read.
    """
    maps = _maps(train, like)
    maps[~((maps > min_m) & (maps < max_m))] = np.inf
    measured = maps[np.isfinite(maps)]
    if measured.size == 0:
        return []
    median = float(np.median(measured))
    del measured
    of_pixel, weighted = np.empty_like(maps[0]), np.empty_like(maps[0])
    for top in range(0, maps.shape[1], _ROWS):
        rows = slice(top, top + _ROWS)
        of_pixel[rows], weighted[rows] = _medians(maps[:, rows], median)
    few = f" of {len(maps):,} maps" if len(maps) < len(train) else ""
    return [
        Blind(f"training median{few}, {median:.2f} m", np.full_like(of_pixel, median)),
        Blind(f"training median{few} of each pixel", of_pixel),
        Blind(f"training median{few} of each pixel, weighted by 1 / depth", weighted),
    ]


def _maps(train: DepthDataset, like: DepthDataset) -> Depth:
    """(n, H, W) training maps at the size of the first."""
    first = read_label(train, 0, like)
    chosen = spread(range(len(train)), max(1, _MOST_PIXELS // first.size))
    maps = np.empty((len(chosen), *first.shape), np.float32)
    for own, index in zip(maps, chosen, strict=True):
        own[:] = _at(read_label(train, index, like), (first.shape[0], first.shape[1]))
    return maps


def read_label(data: DepthDataset, index: int, like: DepthDataset | None = None) -> Depth:
    """The label of an image as the evaluation of `like` sees it, cut but not scaled; the image is not read."""
    sample, transform = data.samples[index], (like or data).transform
    assert sample.depth is not None
    depth_m = data.rule.read(sample.depth)
    window = transform.window((depth_m.shape[0], depth_m.shape[1]))  # type: ignore[union-attr]
    return cut(depth_m, window)


def _medians(maps: Depth, otherwise: float) -> tuple[Depth, Depth]:
    """Along the first dimension, inf left out: the median, and the median weighted by 1 / value."""
    ordered = np.sort(maps, axis=0)
    number = np.isfinite(ordered).sum(axis=0)
    lower, upper = np.maximum(number - 1, 0) // 2, np.minimum(number // 2, len(maps) - 1)
    median = (_take(ordered, lower) + _take(ordered, upper)) / 2
    weights = np.cumsum(1 / ordered, axis=0, dtype=np.float64)
    weighted = _take(ordered, np.argmax(weights >= weights[-1] / 2, axis=0))
    return np.where(number > 0, median, otherwise), np.where(number > 0, weighted, otherwise)


def _take(maps: Depth, index: npt.NDArray[np.int64]) -> Depth:
    taken: Depth = np.take_along_axis(maps, index[None], axis=0)[0]
    return taken


def _at(depth_m: Depth, size: Sequence[int]) -> Depth:
    if depth_m.shape == tuple(size):
        return depth_m
    resized: Depth = cv2.resize(depth_m, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
    return resized
