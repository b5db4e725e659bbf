"""From a head's maps of the windows of an image to the image's prediction, a few channels at a time.

150 classes of 1024 x 2048 pixels are 1.3 GB, and averaging, resizing and softmax each want another copy. What is kept
here of a window is the head's map at its own resolution, a thousandth of that.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dense_heads.ops.pad import Placement
from dense_heads.ops.resize import resize
from dense_heads.ops.threads import map_in_threads
from dense_heads.ops.windows import Box, average, cover
from dense_heads.structures import Size

_CHUNK_BYTES = 4 * 2**20  # of full-size channels at once on a CPU, where they are to stay in a cache
_CHUNK_BYTES_ELSEWHERE = 512 * 2**20
# Resizing treats all channels alike, but its kernels take another way, with another rounding, for 3 channels and for
# what is left over of a vector. In multiples of this, the rest with the last chunk, all bits are those of the whole.
_MULTIPLE = 8
_STRIP = 3 * 2**13  # pixels worked on at once on a CPU: in cache, and too few for PyTorch to split among threads
_WORKING_BYTES = 256 * 2**20  # of chunks of all threads together
_KEPT_BYTES = 512 * 2**20  # of scores that are needed again
_SETTLED_BYTES = 64 * 2**20  # of all channels of undecided pixels

# Two logits of a pixel that are no further apart may get one probability from a softmax in float32.
_LOGIT_GAP = 5e-7
# Relative distance of sums of probabilities: twice the distance between two ways to compute a softmax.
_PROBABILITY_GAP = 4e-6


@dataclass(frozen=True)
class Window:
    """What a head says of a window."""

    box: Box  # in the view
    map: Tensor  # (K, h, w), at the head's own resolution
    placement: Placement  # on the window's pixels

    def enlarged(self, channels: slice) -> Tensor:
        """(k, *pixels of the window), in float32 at least."""
        part = self.map[channels]
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        return self.placement.enlarge(part[None])[0]


@dataclass(frozen=True)
class Look:
    """One view of an image, straight or mirrored, with all its windows in order."""

    view_size: Size
    flip: bool
    size: Size  # (height, width) of the result
    windows: Sequence[Window]

    def scores(self, channels: slice = slice(None)) -> Tensor:
        """(k, *size): windows averaged by count, then resized, then un-flipped; in float32 at least."""
        placed = ((window.box, window.enlarged(channels)) for window in self.windows)
        scores = next(placed)[1] if len(self.windows) == 1 else average(placed, self._cover)
        scores = resize(scores[None], self.size)[0]
        return scores.flip(-1) if self.flip else scores

    @functools.cached_property
    def _cover(self) -> Tensor:
        return cover(self.view_size, [window.box for window in self.windows], self.windows[0].map.device)


def mean(looks: Sequence[Look], activate: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(K, H, W): the mean over looks of their scores, or of what `activate` makes of them; all channels at once."""
    total: Tensor | None = None
    for look in looks:
        scores = look.scores() if activate is None else activate(look.scores())
        total = scores if total is None else total + scores
    assert total is not None, "no looks"
    return total / len(looks) if len(looks) > 1 else total


def most_probable(looks: Sequence[Look]) -> Tensor:
    """(H, W) int64: exactly the argmax of `mean(looks, softmax)`, the first where several are equal; memory is bounded.

    Of one look the largest logit decides. Of several a first walk over the channels finds what their softmax divides
    by, a second one adds probabilities. Pixels whose best two are so close that rounding could decide are computed
    again in the plain way.
    """
    scores = _Scores(looks)
    norms = [scores.norm(look) for look in range(len(looks))] if len(looks) > 1 else []
    votes = map_in_threads(functools.partial(_vote, scores, norms), scores.shares, scores.device)
    vote = functools.reduce(_Vote.merge, votes)
    undecided = vote.undecided(None if norms else _LOGIT_GAP).nonzero().flatten()
    if len(undecided):
        vote.winner[undecided] = scores.settled(undecided)
    return vote.winner.long().view(looks[0].size)


class _Vote:
    """The best of all channels seen so far, and how good the second best is, of each pixel."""

    def __init__(self, start: Tensor) -> None:
        """`start`: (pixels,), lower than any score."""
        self.best, self.second = start, start.clone()
        self.winner = torch.zeros_like(start, dtype=torch.int16)

    def add(self, scores: Tensor, first: int, strip: slice) -> None:
        """Channels (k, pixels) from number `first` on, of some pixels; later ones win only if they are better."""
        best, second, winner = self.best[strip], self.second[strip], self.winner[strip]
        for number, plane in enumerate(scores[:, strip], first):
            winner.masked_fill_(plane > best, number)
            torch.maximum(second, torch.minimum(best, plane), out=second)
            torch.maximum(best, plane, out=best)

    def merge(self, later: "_Vote") -> "_Vote":
        """Take in what came of later channels."""
        torch.where(later.best > self.best, later.winner, self.winner, out=self.winner)
        torch.maximum(self.second, torch.maximum(later.second, torch.minimum(self.best, later.best)), out=self.second)
        torch.maximum(self.best, later.best, out=self.best)
        return self

    def undecided(self, gap: float | None) -> Tensor:
        """Pixels whose best two are no further apart than `gap` (None: than probabilities' rounding), or not finite."""
        limit = _PROBABILITY_GAP * self.best if gap is None else gap
        self.winner.masked_fill_(~self.best.isfinite(), 0)  # a softmax makes them all nan, of which the first is taken
        return self.best - self.second <= limit


class _Scores:
    """What all looks say, chunk by chunk: kept where there are several and all fit, else computed again each time."""

    def __init__(self, looks: Sequence[Look]) -> None:
        self.looks = looks
        map = looks[0].windows[0].map
        self.device, self.dtype = map.device, torch.promote_types(map.dtype, torch.float32)
        self.num_channels, self.num_pixels = len(map), looks[0].size[0] * looks[0].size[1]
        kept = len(looks) > 1 and 4 * len(looks) * self.num_channels * self.num_pixels <= _KEPT_BYTES
        self.kept: dict[tuple[int, int], Tensor] | None = {} if kept else None
        self.shares = self._shares()
        step = _STRIP if self.device.type == "cpu" else self.num_pixels
        self.strips = [slice(start, start + step) for start in range(0, self.num_pixels, step)]

    def plane(self, value: float) -> Tensor:
        """(pixels,) of one value."""
        return torch.full((self.num_pixels,), value, dtype=self.dtype, device=self.device)

    def get(self, look: int, channels: slice) -> Tensor:
        """(k, pixels); not to be changed."""
        scores = None if self.kept is None else self.kept.get((look, channels.start))
        if scores is None:
            scores = self.looks[look].scores(channels).flatten(1)
            if self.kept is not None:
                self.kept[look, channels.start] = scores
        return scores

    def norm(self, look: int) -> tuple[Tensor, Tensor]:
        """For each pixel the largest logit, and one over the sum of exp(logit - largest)."""
        parts = map_in_threads(functools.partial(self._part_of_norm, look), self.shares, self.device)
        largest = functools.reduce(torch.maximum, [highest for highest, _ in parts])
        total = torch.stack([part * (highest - largest).exp() for highest, part in parts]).sum(dim=0)
        return largest, total.reciprocal_()

    def _part_of_norm(self, look: int, share: Sequence[slice]) -> tuple[Tensor, Tensor]:
        largest, total = self.plane(-torch.inf), self.plane(0.0)
        for channels in share:
            scores = self.get(look, channels)
            for strip in self.strips:
                part, before = scores[:, strip], largest[strip].clone()
                torch.maximum(before, part.amax(dim=0), out=largest[strip])
                total[strip].mul_((before - largest[strip]).exp_()).add_((part - largest[strip]).exp_().sum(dim=0))
        return largest, total

    def settled(self, pixels: Tensor) -> Tensor:
        """The winners (n,) of `pixels` (n,), computed in the plain way from all channels of these pixels."""
        at_once = max(64, _SETTLED_BYTES // (4 * self.num_channels) // 64 * 64)
        winners = []
        for some in torch.split(pixels, at_once):
            # The softmax rounds the rest of a vector otherwise than whole ones; a large image is all but one of them.
            padded = torch.cat([some, some[-1:].expand(-len(some) % 64)])
            total: Tensor | None = None
            for look in range(len(self.looks)):
                parts = map_in_threads(functools.partial(self._columns, look, padded), self.shares, self.device)
                probabilities = torch.cat(parts).softmax(dim=0)
                total = probabilities if total is None else total + probabilities
            assert total is not None
            winners.append((total / len(self.looks)).argmax(dim=0)[: len(some)])
        return torch.cat(winners).to(torch.int16)

    def _columns(self, look: int, pixels: Tensor, share: Sequence[slice]) -> Tensor:
        return torch.cat([self.get(look, channels)[:, pixels] for channels in share])

    def _shares(self) -> list[list[slice]]:
        """Chunks of channels that are at full size together, the same for all looks; shared out among threads."""
        pixels = max(self.num_pixels, *(look.view_size[0] * look.view_size[1] for look in self.looks))
        limit = _CHUNK_BYTES if self.device.type == "cpu" else _CHUNK_BYTES_ELSEWHERE
        num = max(_MULTIPLE, limit // (4 * pixels) // _MULTIPLE * _MULTIPLE)
        stops = [*range(num, self.num_channels - _MULTIPLE + 1, num), self.num_channels]
        chunks = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        if self.device.type != "cpu":
            return [chunks]
        at_once = _WORKING_BYTES // (4 * num * pixels)
        num_shares = max(1, min(torch.get_num_threads(), len(chunks), at_once))
        bounds = [len(chunks) * share // num_shares for share in range(num_shares + 1)]
        return [chunks[start:stop] for start, stop in pairwise(bounds)]


def _vote(scores: _Scores, norms: Sequence[tuple[Tensor, Tensor]], share: Sequence[slice]) -> _Vote:
    """Among the channels of one share."""
    vote = _Vote(scores.plane(-torch.inf))
    for channels in share:
        total = scores.get(0, channels)
        if norms:
            total = torch.zeros_like(total)
            for look, (largest, factor) in enumerate(norms):
                own = scores.get(look, channels)
                for strip in scores.strips:
                    total[:, strip].add_((own[:, strip] - largest[strip]).exp_().mul_(factor[strip]))
        for strip in scores.strips:
            vote.add(total, channels.start, strip)
    return vote
