"""The contract of heads that learn nothing by gradient: they look at labelled images once, then predict."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.structures import IGNORE_INDEX, Batch, Features


class TrainingFreeHead(Head):
    """`observe` labelled images one after the other, `conclude`, then predict as any head.

    What it knows is in buffers, whose shapes depend on what it saw; a state dict brings its own shapes.
    """

    default_support: int | None = None  # images that are looked at where nothing else is said; None: all

    def observe(self, features: Features, batch: Batch) -> None:
        """Take in images and their `mask` (B, H, W)."""
        raise NotImplementedError

    def conclude(self) -> None:
        """All has been seen: make of it what `forward` needs.

        Raises:
            UserError: what was seen is not enough.
        """
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            stored = state_dict.get(prefix + name)
            if buffer is not None and isinstance(stored, Tensor):
                self._buffers[name] = torch.empty_like(stored, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def joined(features: Features, channels: Sequence[int]) -> Tensor:
    """All chosen blocks of an image batch as one map (B, D, h, w), each patch of each block of length 1."""
    maps = features.patch_maps
    assert tuple(map.shape[1] for map in maps) == tuple(channels), "maps of another width than the head was made for"
    return torch.cat([F.normalize(map.float(), dim=1) for map in maps], dim=1)


def patch_shares(mask: Tensor, num_classes: int, features: Features) -> tuple[Tensor, Tensor]:
    """What each patch holds, as heads see it: the map stands for the image without its padding.

    Args:
        mask: (B, H, W) class ids, 255 = ignored.
        num_classes: K.
        features: of the same images.

    Returns:
        (B, K, h, w) share of each class among the patch's labelled pixels, and (B, h, w) the share that is labelled.
    """
    rows, columns = features.patch_maps[0].shape[-2:]
    size = (int(rows), int(columns))
    valid = mask != IGNORE_INDEX
    one_hot = F.one_hot(torch.where(valid, mask, 0), num_classes).permute(0, 3, 1, 2) * valid[:, None]
    sums = F.adaptive_avg_pool2d(one_hot.float(), size)
    labelled = F.adaptive_avg_pool2d(valid[:, None].float(), size)
    return sums / labelled.clamp(min=1e-6), labelled[:, 0]


def label_of(batch: Batch) -> Tensor:
    """The one class of each pixel.

    Raises:
        UserError: labels overlap.
    """
    mask = batch.get("mask")
    if not isinstance(mask, Tensor):
        raise UserError(
            "A head without training needs one class for each pixel; the labels of this task overlap "
            "(task.multilabel=true). Use a head that is trained, such as head=linear4."
        )
    return mask
