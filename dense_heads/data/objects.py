"""The objects of an image as annotations tell of them, and what is repaired in them.

The rules, the same for every format. Repaired, with a notice that counts them: a box of zero area (left out), a box
that reaches outside the image (cut; left out where nothing of it is inside; a reach of up to one pixel is rounding and
stays), a polygon of fewer than three points (left out; an object without any other outline stays as a box and is left
out where masks are learnt). Refused, with the file and the annotation: a category or image that is not there, numbers
that are none.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.data.datasets.base import Sample, shorten
from dense_heads.errors import UserError
from dense_heads.ops import masks
from dense_heads.structures import Size

Outline = str | list[list[float]] | None  # run-length code; polygons x1, y1, x2, y2, ...; not known
_ROUNDING = 1.0  # pixels by which a box may reach outside
_FAR = 3.0  # times the image's side: coordinates beyond are no outline of it


@dataclass(frozen=True, eq=False, repr=False)
class Objects:
    """What is annotated in one image of (height, width) = `size`; n objects."""

    size: Size
    boxes: npt.NDArray[np.float64]  # (n, 4) xyxy pixels, the far edges exclusive
    labels: npt.NDArray[np.int64]  # (n,)
    iscrowd: npt.NDArray[np.bool_]  # (n,) regions of many objects: not learnt, and no miss or false alarm in metrics
    difficult: npt.NDArray[np.bool_]  # (n,) VOC: not learnt, not counted in VOC's metric
    area: npt.NDArray[np.float64]  # (n,) as annotated; it decides small, medium and large
    outlines: tuple[Outline, ...]  # n

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        """With a digest of all values: a cache of items sees by it that annotations changed."""
        digest = hashlib.sha256(repr(self.outlines).encode())
        for array in (self.boxes, self.labels, self.iscrowd, self.difficult, self.area):
            digest.update(np.ascontiguousarray(array).tobytes())
        return f"Objects({len(self)} in {self.size[0]} x {self.size[1]}, {digest.hexdigest()[:16]})"

    def chosen(self, keep: npt.NDArray[Any]) -> "Objects":
        """Those where `keep` (n,) is true."""
        outlines = tuple(outline for outline, kept in zip(self.outlines, keep, strict=True) if kept)
        arrays = {name: getattr(self, name)[keep] for name in ("boxes", "labels", "iscrowd", "difficult", "area")}
        return replace(self, outlines=outlines, **arrays)

    def codes(self) -> list[str | None]:
        """Each outline as run lengths."""
        made: list[str | None] = []
        for outline in self.outlines:
            polygons = isinstance(outline, list)
            made.append(masks.encode_polygons(outline, self.size) if polygons else outline)  # type: ignore[arg-type]
        return made


@dataclass(frozen=True, eq=False)
class DetectionSample(Sample):
    """An image and its objects."""

    objects: Objects | None = None  # None where a test set keeps them to itself
    coco_id: int | None = None  # of the image, in COCO files


@dataclass
class Repairs:
    """What was repaired in one file or folder of annotations."""

    source: Path
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, which: str) -> None:
        """Count one; `kind` is a sentence without its number."""
        self.found.setdefault(kind, []).append(which)

    def notices(self) -> list[str]:
        """One sentence for each kind, with the number and the first of them."""
        return [f"{self.source}: {len(which)} {kind}: {shorten(which, 3)}" for kind, which in self.found.items()]


class ObjectsBuilder:
    """Collects the objects of one image under the rules above."""

    def __init__(self, size: Size, repairs: Repairs) -> None:
        """`size`: (height, width) of the image."""
        self.size, self.repairs = size, repairs
        self.rows: list[tuple[list[float], int, bool, bool, float, Outline]] = []

    def add(
        self,
        which: str,
        box: Sequence[float] | None,
        label: int,
        iscrowd: bool = False,
        difficult: bool = False,
        area: float | None = None,
        outline: Any = None,
    ) -> None:
        """Add one object, or repair it, or leave it out.

        Args:
            which: how messages name it, "annotation 17".
            box: xyxy pixels; None takes the outline's extent.
            label: index of its category.
            iscrowd: see Objects.
            difficult: see Objects.
            area: in pixels; None or 0 takes the outline's, else the box's.
            outline: polygons, run lengths as a dict with `size` and `counts`, or None.

        Raises:
            UserError: numbers that are none.
        """
        shape = self._outline(which, outline)
        if box is None:
            box = self._extent(shape)
            if box is None:
                self.repairs.add("objects without a usable outline left out", which)
                return
        fitted = self._box(which, box)
        if fitted is None:
            return
        if not area:
            code = masks.encode_polygons(shape, self.size) if isinstance(shape, list) else shape
            whole = masks.area(code, self.size) if code else 0
            area = whole or (fitted[2] - fitted[0]) * (fitted[3] - fitted[1])
        self.rows.append((fitted, label, iscrowd, difficult, float(area), shape))

    def build(self) -> Objects:
        """All of them."""
        boxes, labels, iscrowd, difficult, area, outlines = zip(*self.rows, strict=True) if self.rows else [()] * 6
        return Objects(
            size=self.size,
            boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
            labels=np.array(labels, dtype=np.int64),
            iscrowd=np.array(iscrowd, dtype=bool),
            difficult=np.array(difficult, dtype=bool),
            area=np.array(area, dtype=np.float64),
            outlines=tuple(outlines),
        )

    def _box(self, which: str, box: Sequence[float]) -> list[float] | None:
        if len(box) != 4 or not all(_is_number(value) for value in box):
            raise self._refused(which, f"its box is {_short(box)}", "four finite numbers")
        left, top, right, bottom = (float(value) for value in box)
        if right <= left or bottom <= top:
            self.repairs.add("boxes of zero area left out", which)
            return None
        height, width = self.size
        if right <= 0 or bottom <= 0 or left >= width or top >= height:
            self.repairs.add("boxes outside their image left out", which)
            return None
        if max(-left, -top, right - width, bottom - height) > _ROUNDING:
            self.repairs.add("boxes that reach outside their image cut", which)
            left, top, right, bottom = max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)
        return [left, top, right, bottom]

    def _outline(self, which: str, outline: Any) -> Outline:
        if outline is None or outline == []:
            return None
        if isinstance(outline, dict):
            return self._runs(which, outline)
        if not isinstance(outline, list) or not all(isinstance(polygon, list) for polygon in outline):
            raise self._refused(which, f"its segmentation is {_short(outline)}", "a list of polygons, or run lengths")
        limit = _FAR * max(self.size)
        for polygon in outline:
            if not all(_is_number(value) and abs(value) <= limit for value in polygon):
                raise self._refused(which, f"its polygon is {_short(polygon)}", "finite numbers near the image")
        whole = [polygon for polygon in outline if len(polygon) >= 6 and len(polygon) % 2 == 0]
        for _ in range(len(outline) - len(whole)):
            self.repairs.add("polygons of fewer than three points (or of half a point) left out", which)
        return whole or None

    def _runs(self, which: str, outline: dict[str, Any]) -> str:
        counts, size = outline.get("counts"), outline.get("size")
        if not isinstance(size, list) or tuple(size) != self.size:
            raise self._refused(which, f"its run lengths are of size {_short(size)}", f"{list(self.size)}, the image's")
        pixels = self.size[0] * self.size[1]
        try:
            if isinstance(counts, str) and masks.num_pixels(counts) == pixels:
                return counts
            if isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts) and sum(counts) == pixels:
                return masks.encode_runs(counts, self.size)
        except ValueError:
            pass
        raise self._refused(which, f"its run lengths are {_short(counts)}", f"a code of {pixels} pixels")

    def _extent(self, shape: Outline) -> tuple[float, float, float, float] | None:
        if isinstance(shape, list):
            points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in shape])
            low, high = points.min(axis=0), points.max(axis=0)
            return float(low[0]), float(low[1]), float(high[0]), float(high[1])
        return masks.extent(shape, self.size) if shape else None

    def _refused(self, which: str, got: str, expected: str) -> UserError:
        return UserError(f"{self.repairs.source}: {which}: {got}; expected {expected}. Correct or remove it.")


def relabelled(sample: DetectionSample, new: Mapping[int, int]) -> DetectionSample:
    """The sample with other labels: old -> new."""
    if sample.objects is None:
        return sample
    labels = np.array([new[label] for label in sample.objects.labels.tolist()], dtype=np.int64)
    return replace(sample, objects=replace(sample.objects, labels=labels))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
