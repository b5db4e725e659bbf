"""The contract of heads that learn nothing by gradient: they look at labelled images once, then predict."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.structures import IGNORE_INDEX, Batch, Features


class Source(NamedTuple):
    """Where labelled patches come from: an image, and the case that it belongs to (of a slice its volume)."""

    case: str
    image: str


class TrainingFreeHead(Head):
    """`observe` labelled images one after the other, `conclude`, then predict as any head.

    What it knows is in buffers, whose shapes depend on what it saw; a state dict brings its own shapes.
    """

    default_support: int | None = None  # images that are looked at where nothing else is said; None: all

    def observe(self, features: Features, batch: Batch) -> None:
        """Take in images and their `mask` (B, H, W); `case_id` and `image_id` where they are known."""
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


def sources_of(batch: Batch, num: int, seen: int) -> list[Source]:
    """Where each of `num` images comes from; what has no name is a case by itself, numbered after the `seen` ones."""
    images = batch.get("image_id") or [f"#{seen + index}" for index in range(num)]
    return [Source(*names) for names in zip(batch.get("case_id") or images, images, strict=True)]


def left_out_together(sources: Sequence[Source]) -> list[int]:
    """A number for each image, equal where one must not help to predict the other.

    That is in one case, or where there is one case only, in one image (which comes several times if it is looked at in
    windows).
    """
    names: list[str] = [source.case for source in sources]
    if len(set(names)) == 1:
        names = [source.image for source in sources]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return [numbers[name] for name in names]


def best_offsets(scores: Tensor, shares: Tensor, groups: Tensor, rounds: int = 2) -> Tensor:
    """An offset for each class but the first, so that the winner by score + offset has the largest Dice.

    Class by class, the others held: the threshold with the largest Dice of that class against the rest, where a patch
    counts with the share of it that is labelled so. All images weigh alike: one large image unlike the others would
    else decide for all. And of several images all but one together may not get more of a class than they have: where it
    is hardly told from the rest, Dice is largest with nearly everything taken, and images to come, which hold less of
    it than those that were chosen for what they show, would be covered with it. One is left out, the one that gets most
    too much, for an image unlike the others would else use up what is granted to all.

    Args:
        scores: (K, N).
        shares: (K, N) of each patch's pixels.
        groups: (N,) which image (case) a patch is of.
        rounds: over the classes.

    Returns:
        (K,), the first 0, and 0 for a class that no patch shows.
    """
    offsets = scores.new_zeros(len(scores))
    _, image, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    shares = shares / counts[image]
    labelled = shares.sum(dim=0)
    for _ in range(rounds if len(scores) > 2 else 1):
        for number in (shares[1:].sum(dim=1) > 0).nonzero()[:, 0].add(1).tolist():
            others = (scores + offsets[:, None]).clone()
            others[number] = -torch.inf
            margin, order = (scores[number] - others.amax(dim=0)).sort(descending=True)
            last = F.pad(margin[:-1] != margin[1:], (0, 1), value=True).nonzero()[:, 0]  # of those that are alike
            right, taken = shares[number][order].cumsum(0)[last], labelled[order].cumsum(0)[last]
            dice = 2 * right / (taken + shares[number].sum()).clamp(min=1e-6)
            dice[1:][_is_too_much(shares[number], labelled, image, order)[last][1:]] = -1
            best = int(last[dice.argmax()])
            after = margin[min(best + 1, len(margin) - 1)]
            offsets[number] = -(margin[best] + after) / 2  # between the last one that is taken and the next
    return offsets


def _is_too_much(share: Tensor, labelled: Tensor, image: Tensor, order: Tensor) -> Tensor:
    """(N,): whether with so many of the patches, in this order, all images but one get more of a class than they have.

    Args:
        share: (N,) of the class in each patch.
        labelled: (N,) of each patch.
        image: (N,) number of its image.
        order: (N,) of patches.
    """
    labelled, share = labelled.double(), share.double()
    there = torch.zeros(int(image.max()) + 1, dtype=torch.double, device=share.device).index_add_(0, image, share)
    of = image[order]
    gets = _running_sums(labelled[order], of) - there[of]  # what the image of each patch has got too much, up to it
    largest = gets.cummax(0).values.clamp(min=-float(there.min()))  # what an image gets never shrinks on the way
    return labelled[order].cumsum(0) - there.sum() - largest > 1e-4 * there.sum()  # of one image nothing is left


def _running_sums(values: Tensor, groups: Tensor) -> Tensor:
    """(N,): sums of `values` so far, of each group for itself."""
    together = groups.argsort(stable=True)
    sums = values[together].cumsum(0)
    first = F.pad(groups[together][1:] != groups[together][:-1], (1, 0), value=True)
    before = (sums - values[together])[first]
    out = torch.empty_like(values)
    out[together] = sums - before[first.cumsum(0) - 1]
    return out
