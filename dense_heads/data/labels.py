"""Raw mask values -> train ids: the only place where labels get their meaning."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from dense_heads.data.datasets.base import shorten
from dense_heads.data.images import open_image, upright
from dense_heads.errors import UserError, unknown_name
from dense_heads.structures import IGNORE_INDEX

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
_LARGEST = 65535  # of a raw id: 16-bit masks
_LOOK = 64  # masks looked at before it is decided how a data set stores its labels


class LabelRule:
    """How a data set's masks are read: every raw value becomes a train id 0..num_classes-1, or 255 = ignored.

    By default the values of a mask are the train ids and 255 is ignored. Palette PNGs are read as indices. Two
    decisions are made for the data set as a whole, from its first masks (`prepare`), and announced: with two classes
    and nothing else said, masks of 0 and one other value (0/255 in most tools) are background and foreground; RGB masks
    are read through the classes' own colours. JPEG masks are lossy: they are thresholded at 128 to 0/255 where there
    are two classes, and refused otherwise.

    Args:
        num_classes: 2 to 255.
        map: raw value -> train id (or 255). Values that it leaves out are errors, unless ignored.
        ignore: raw values that count nowhere; for RGB masks colours, `[[0, 0, 0]]`.
        reduce_zero: 0 is ignored and every other value is one less (ADE20K).
        colours: (K, 3) colours of the classes, for RGB masks; None where `classes.txt` gives none.
        encoding: `ids` or `colours`; None decides from the first masks.

    Raises:
        UserError: settings that contradict each other.
    """

    def __init__(
        self,
        num_classes: int,
        map: Mapping[int, int] | None = None,
        ignore: Sequence[int | Sequence[int]] = (),
        reduce_zero: bool = False,
        colours: Array | Sequence[Sequence[int]] | None = None,
        encoding: Literal["ids", "colours"] | None = None,
    ) -> None:
        if not 2 <= num_classes <= IGNORE_INDEX - reduce_zero:
            limit = IGNORE_INDEX - reduce_zero
            raise UserError(f"num_classes is {num_classes}; expected 2 to {limit} (255 is the ignored label).")
        if encoding not in (None, "ids", "colours"):
            raise unknown_name("encoding of masks", str(encoding), ["ids", "colours"])
        if map and reduce_zero:
            raise UserError("labels.map and labels.reduce_zero are both set; expected one. Put the shift into the map.")
        if encoding == "colours" and colours is None:
            raise UserError(
                "Masks are said to hold colours, but classes.txt gives none; add a tab and R,G,B to each line."
            )
        self.num_classes = num_classes
        self.map = {int(raw): int(train_id) for raw, train_id in map.items()} if map else None
        self.ignore = tuple(int(v) for v in ignore if isinstance(v, int))
        self.ignore_colours = tuple(tuple(int(c) for c in v) for v in ignore if not isinstance(v, int))
        self.reduce_zero = reduce_zero
        self.colours = None if colours is None else np.asarray(colours, dtype=np.int64).reshape(-1, 3)
        self.encoding = encoding
        self.notices: list[str] = []
        self._check()
        self._table = self._lookup_table()

    def prepare(self, masks: Sequence[Path]) -> None:
        """Decide, once, how this data set stores its labels, from up to 64 of its masks spread evenly.

        Raises:
            UserError: one of them cannot be read, or holds colours where `classes.txt` gives none.
        """
        if self.encoding is not None or not masks:
            return
        values: set[int] = set()
        stored_as_rgb = False
        for i in np.unique(np.linspace(0, len(masks) - 1, _LOOK).round().astype(int)):
            raw = _read_raw(masks[i], self.num_classes)
            if raw.ndim == 3 and not _is_grey(raw):
                self._decide_colours(masks[i])
                return
            stored_as_rgb |= raw.ndim == 3
            values |= {int(v) for v in distinct(raw[..., 0] if raw.ndim == 3 else raw) if np.isfinite(v)}
        if stored_as_rgb and self.colours is not None and max(values) >= self.num_classes:
            greys = {int(c[0]) for c in self.colours if c[0] == c[1] == c[2]}
            greys |= {c[0] for c in self.ignore_colours if c[0] == c[1] == c[2]}
            if values <= greys:  # the classes' own colours happen to be greys
                self._decide_colours(masks[0])
                return
        self.decide_ids(values)

    def decide_ids(self, values: set[int]) -> None:
        """Decide that masks hold ids, of which `values` occur: with two classes 0 and one other value are 0 and 1."""
        self.encoding = "ids"
        foreground = values - set(self.ignore) - {0}
        if self.num_classes == 2 and not self.map and not self.reduce_zero and len(foreground) == 1:
            value = foreground.pop()
            if value > 1:
                self.map = {0: 0, value: 1}
                self._check()
                self._table = self._lookup_table()
                self._notice(f"masks are binary: 0 is class 0, {value} is class 1")

    def _decide_colours(self, example: Path) -> None:
        if self.colours is None:
            raise UserError(
                f"{example}: a mask with colours, and classes.txt gives none. Expected class ids in one channel; or "
                "add a tab and R,G,B to each line of classes.txt, and the masks are read through them."
            )
        self.encoding = "colours"
        self._check()
        self._notice("masks hold colours: they are read through the colours of classes.txt")

    def read(self, path: Path) -> npt.NDArray[np.int64]:
        """Read a mask file as train ids: (H, W) int64.

        Raises:
            UserError: unreadable, or a value that is no class; names the values found and what to set.
        """
        raw = _read_raw(path, self.num_classes)
        try:
            return self(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def __call__(self, raw: Array) -> npt.NDArray[np.int64]:
        """Raw values (H, W), or colours (H, W, 3), as train ids (H, W) int64."""
        if raw.ndim == 3 and self.encoding != "colours":
            if not _is_grey(raw):
                raise UserError(
                    "a mask with colours where class ids in one channel were expected. Save it as ids, or set "
                    "task.data.labels.encoding=colours and give each line of classes.txt a tab and R,G,B."
                )
            raw = raw[..., 0]
        if raw.ndim == 2 and self.encoding == "colours":
            raw = np.repeat(raw[..., None], 3, axis=2)  # a grey file among colour masks: an all-black one, for instance
        if raw.ndim == 3:
            return self._from_colours(raw)
        low, high = raw.min(), raw.max()
        if not np.issubdtype(raw.dtype, np.integer) or low < 0 or high > _LARGEST:
            raise UserError(
                f"mask values {low:g}..{high:g} as {raw.dtype}; expected whole numbers from 0 to {_LARGEST}. "
                "Save the mask as 8-bit or 16-bit class ids."
            )
        ids = self._table[raw]
        if ids.min() < 0:
            raise self._outside(np.unique(raw[ids < 0]).tolist())
        return ids

    def to_raw(self, train_ids: Array) -> Array:
        """Train ids (H, W) back in the data set's own values: uint8 or uint16 (H, W), or its colours (H, W, 3).

        Where several values mean one class the smallest is taken; ignored pixels become the first ignored value.
        """
        if self.encoding == "colours" and self.colours is not None:
            void = self.ignore_colours[0] if self.ignore_colours else (0, 0, 0)
            palette = np.vstack([self.colours, np.tile(void, (IGNORE_INDEX + 1 - self.num_classes, 1))])
            return palette.astype(np.uint8)[train_ids]
        back = np.zeros(IGNORE_INDEX + 1, dtype=np.int64)
        back[IGNORE_INDEX] = 0 if self.reduce_zero else (*self.ignore, IGNORE_INDEX)[0]
        for train_id in range(self.num_classes):
            values = np.flatnonzero(self._table == train_id)
            back[train_id] = values[0] if len(values) else back[IGNORE_INDEX]
        return back.astype(np.uint8 if back.max() <= 255 else np.uint16)[train_ids]

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values with the decisions made, so that a card can keep them."""
        return {
            "num_classes": self.num_classes,
            "map": self.map,
            "ignore": [*self.ignore, *(list(colour) for colour in self.ignore_colours)],
            "reduce_zero": self.reduce_zero,
            "colours": None if self.colours is None else self.colours.tolist(),
            "encoding": self.encoding,
        }

    def _lookup_table(self) -> npt.NDArray[np.int64]:
        """Train id of every raw value, -1 where it has none."""
        table = np.full(_LARGEST + 1, -1, dtype=np.int64)
        if self.map is not None:
            for raw, train_id in self.map.items():
                table[raw] = train_id
        else:
            first = int(self.reduce_zero)
            table[first : first + self.num_classes] = np.arange(self.num_classes)
            table[:first] = IGNORE_INDEX
            table[IGNORE_INDEX] = IGNORE_INDEX
        table[list(self.ignore)] = IGNORE_INDEX
        return table

    def _from_colours(self, raw: Array) -> npt.NDArray[np.int64]:
        assert self.colours is not None, "encoding=colours without colours"
        codes = _codes(np.vstack([self.colours, np.array(self.ignore_colours, dtype=np.int64).reshape(-1, 3)]))
        train_ids = np.r_[np.arange(len(self.colours)), np.full(len(self.ignore_colours), IGNORE_INDEX)]
        order = np.argsort(codes)
        pixels = _codes(raw)
        place = np.searchsorted(codes[order], pixels).clip(max=len(codes) - 1)
        found = codes[order][place] == pixels
        if not found.all():
            strange = [f"({c >> 16},{c >> 8 & 255},{c & 255})" for c in np.unique(pixels[~found]).tolist()]
            raise UserError(
                f"{len(strange)} colours that no class has: {shorten(strange)}. Expected the colours of classes.txt. "
                "Add them there, or name colours that count nowhere in task.data.labels.ignore=[[R,G,B]]."
            )
        ids: npt.NDArray[np.int64] = train_ids[order][place]
        return ids

    def _outside(self, values: list[int]) -> UserError:
        expected = shorten([str(v) for v in np.flatnonzero(self._table >= 0)], 12)
        return UserError(
            f"mask values outside the classes: {shorten([str(v) for v in values])}. Expected {expected} for "
            f"num_classes={self.num_classes}. Name values that count nowhere in task.data.labels.ignore=[...], give a "
            "table task.data.labels.map={value: class}, or raise task.num_classes."
        )

    def _check(self) -> None:
        table = self.map or {}
        for raw, train_id in table.items():
            if not 0 <= raw <= _LARGEST or not (0 <= train_id < self.num_classes or train_id == IGNORE_INDEX):
                raise UserError(
                    f"labels.map says {raw}: {train_id}; expected a raw value of 0..{_LARGEST} and a class of "
                    f"0..{self.num_classes - 1}, or 255 to ignore it."
                )
        for raw in self.ignore:
            if not 0 <= raw <= _LARGEST:
                raise UserError(f"labels.ignore names {raw}; expected raw values of 0..{_LARGEST}.")
            if table.get(raw, IGNORE_INDEX) != IGNORE_INDEX:
                raise UserError(f"labels.ignore names {raw}, which labels.map makes a class; expected one of both.")
        if any(len(colour) != 3 for colour in self.ignore_colours):
            raise UserError(f"labels.ignore holds {self.ignore_colours}; expected colours [R,G,B].")
        if self.colours is not None and len(self.colours) != self.num_classes:
            raise UserError(f"{len(self.colours)} colours for {self.num_classes} classes; expected one for each.")
        if self.encoding == "colours" and self.colours is not None:
            palette = [*(tuple(colour) for colour in self.colours.tolist()), *self.ignore_colours]
            twice = [str(colour) for colour, count in Counter(palette).items() if count > 1]
            if twice:
                raise UserError(f"{shorten(twice)} is the colour of two classes; RGB masks need different ones.")

    def _notice(self, text: str) -> None:
        self.notices.append(text)
        log.info(text)


def distinct(values: Array) -> Array:
    """The different values, sorted; for labels many times quicker than `np.unique`, which sorts all pixels."""
    if np.issubdtype(values.dtype, np.integer) and 0 <= values.min() and values.max() <= _LARGEST:
        return np.flatnonzero(np.bincount(values.ravel()))
    return np.unique(values)


def _read_raw(path: Path, num_classes: int) -> Array:
    """The stored values of a mask, upright: (H, W), or (H, W, 3) where the file has colours."""
    with open_image(path) as image:
        lossy = image.format == "JPEG"
        image = upright(image)
        if image.mode in ("LA", "La", "PA"):
            values: Array = np.asarray(image)[..., 0] if image.mode != "La" else np.asarray(image.convert("LA"))[..., 0]
        elif image.mode in ("1", "L", "P", "I", "F") or image.mode.startswith("I;"):
            values = np.asarray(image)
        else:
            values = np.asarray(image.convert("RGB"))
    if lossy:
        if num_classes != 2:
            raise UserError(
                f"{path}: a JPEG mask with {num_classes} classes. JPEG changes values, so class ids in it are lost; "
                "expected PNG. Export the masks again as PNG."
            )
        grey = np.asarray(Image.fromarray(values).convert("L")) if values.ndim == 3 else values
        return np.where(grey >= 128, 255, 0)
    if values.dtype == np.bool_:
        return values.astype(np.uint8)
    if np.issubdtype(values.dtype, np.floating) and np.array_equal(values, np.round(values)):
        return values.astype(np.int64)
    return values


def _is_grey(raw: Array) -> bool:
    return bool((raw[..., 0] == raw[..., 1]).all() and (raw[..., 0] == raw[..., 2]).all())


def _codes(colours: Array) -> npt.NDArray[np.int64]:
    wide = colours.astype(np.int64)
    codes: npt.NDArray[np.int64] = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return codes
