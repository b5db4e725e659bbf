"""A data set's item with features in place of its image, as named tensors and plain values that a file can hold."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dense_heads.structures import Level, Levels, Padding, SeenView

PIXELS = ("image", "views")  # what features replace
_SMALL = (torch.uint8, torch.int16, torch.int32)  # int64 is kept in the first that holds it: labels are most of a file


class Record(NamedTuple):
    """One item of a cached data set."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]  # plain: fit for JSON

    @property
    def num_bytes(self) -> int:
        """What its tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def encode(item: Mapping[str, Any], views: Sequence[SeenView], training: bool, dtype: torch.dtype) -> Record:
    """An item and the features of its views as a record.

    Args:
        item: tensors, strings, numbers and tuples of numbers by name; `image` and `views` are left out.
        views: its test views in order; in training one view with one window, the whole image.
        training: whether `decode` gives `features` (training) or `views` (evaluation).
        dtype: of the features; labels keep theirs.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"training": training, "views": [], "plain": {}, "dtypes": {}}
    for index, view in enumerate(views):
        windows = []
        for place, levels in enumerate(view.windows):
            windows.append({"size": levels.image_size, "padding": levels.padding})
            for level in levels.patch_maps:
                name = f"{index}.{place}.{level.block}.{int(level.norm)}.{level.windows}"
                tensors[f"map.{name}"] = levels.patch_maps[level][0].to(dtype, copy=True).contiguous()
                tensors[f"cls.{name}"] = levels.cls_tokens[level][0].to(dtype, copy=True).contiguous()
        values["views"].append({"size": view.size, "windows": windows})
    for name, value in item.items():
        if name in PIXELS:
            continue
        if isinstance(value, Tensor):
            values["dtypes"][name] = str(value.dtype).removeprefix("torch.")
            tensors[f"item.{name}"] = _small(value).contiguous()
        else:
            values["plain"][name] = value
    return Record(tensors, values)


def decode(record: Record) -> dict[str, Any]:
    """The item, with `features` (training: Levels of one image) or `views` (evaluation: a SeenView each) in it."""
    tensors, values = record
    item = {name: tuple(value) if isinstance(value, list) else value for name, value in values["plain"].items()}
    for name, dtype in values["dtypes"].items():
        item[name] = tensors[f"item.{name}"].to(getattr(torch, dtype))
    levels: dict[tuple[int, int], tuple[dict[Level, Tensor], dict[Level, Tensor]]] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "item":
            continue
        view, window, block, norm, parts = map(int, name.split("."))
        maps, tokens = levels.setdefault((view, window), ({}, {}))
        (maps if kind == "map" else tokens)[Level(block, bool(norm), parts)] = tensor[None]
    views = []
    for index, described in enumerate(values["views"]):
        windows = [
            Levels(*levels[index, place], tuple(window["size"]), Padding(*window["padding"]))
            for place, window in enumerate(described["windows"])
        ]
        views.append(SeenView(tuple(described["size"]), windows))
    if values["training"]:
        item["features"] = views[0].windows[0]
    else:
        item["views"] = views
    return item


def _small(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.int64 or tensor.numel() == 0:
        return tensor
    low, high = int(tensor.min()), int(tensor.max())
    for dtype in _SMALL:
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return tensor.to(dtype)
    return tensor
