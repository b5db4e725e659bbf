"""Few-shot segmentation by prototypes: what a class looks like in a few labelled images, found again by cosine."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.heads.training_free import (
    Source,
    TrainingFreeHead,
    best_offsets,
    joined,
    label_of,
    left_out_together,
    patch_shares,
    sources_of,
)
from dense_heads.structures import Batch, Features


@dataclass(frozen=True)
class _Seen:
    """One support image, at patch resolution."""

    features: Tensor  # (D, h, w)
    shares: Tensor  # (K, h, w)
    labelled: Tensor  # (h, w)
    source: Source


@dataclass(frozen=True)
class _Parts:
    """What one support image brings to the prototypes."""

    sums: Tensor  # (K, D) over its patches
    local: Tensor  # (n, D), of its cells
    classes: Tensor  # (n,)


class PrototypeHead(TrainingFreeHead):
    """Class prototypes of a few support images, matched densely by cosine; no training.

    As ALPNet (Ouyang et al., ECCV 2020) and ProtoSAM (Ayzenberg et al., 2024): for each class one global prototype
    (mean of its patches) and local ones (means over the cells of a grid, where a cell belongs to the class); a patch's
    score for a class is its cosine to the class's prototypes, weighted by their softmax. The mean patch of the support
    is taken out first, without which all patches of a backbone look alike.

    Scores of all classes but the first get an offset each, in place of a threshold, chosen on the support
    (`best_offsets`): each of its images (slice: volume) predicted by the prototypes of the others, and by its own for
    a class that no other shows.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: classes, the first of them background.
        blocks: which blocks, by a name that `backbones/zoo.py` resolves.
        norm: whether the backbone's final norm is applied.
        grid: cells along each side; 0: global prototypes only.
        purity: share of a cell that a class needs for a local prototype, above 0 to 1.
        scale: of the cosines, before any softmax.
        calibrate: whether offsets are chosen.

    Raises:
        UserError: arguments out of range; in `conclude`: no patch of the support shows a class.
    """

    default_support = 20

    mean: Tensor
    prototypes: Tensor
    classes: Tensor
    offsets: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        grid: int = 8,
        purity: float = 0.8,
        scale: float = 20.0,
        calibrate: bool = True,
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if not (isinstance(grid, int) and grid >= 0 and 0 < purity <= 1 and scale > 0):
            raise UserError(
                f"head.grid={grid}, head.purity={purity}, head.scale={scale}; expected a whole number from 0 on, a "
                "share above 0 up to 1, and a number above 0."
            )
        self.grid, self.purity, self.scale, self.calibrate = grid, purity, scale, calibrate
        width = sum(self.in_channels)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("prototypes", torch.zeros(0, width))  # (P, D) of length 1
        self.register_buffer("classes", torch.zeros(0, dtype=torch.long))  # (P,)
        self.register_buffer("offsets", torch.zeros(num_outputs))
        self._seen: list[_Seen] = []

    def observe(self, features: Features, batch: Batch) -> None:
        """Take in support images and their `mask` (B, H, W)."""
        shares, labelled = patch_shares(label_of(batch), self.num_outputs, features)
        maps = joined(features, self.in_channels)
        sources = sources_of(batch, len(maps), len(self._seen))
        self._seen += [_Seen(*parts) for parts in zip(maps, shares, labelled, sources, strict=True)]

    def conclude(self) -> None:
        """Make the prototypes and choose the offsets."""
        if not self._seen:
            raise UserError("head=prototype has seen no support images. Set support=5, or name some: support=[ID,ID].")
        self.mean = torch.cat([seen.features.flatten(1) for seen in self._seen], dim=1).mean(dim=1)
        parts = [self._parts_of(seen) for seen in self._seen]
        self.prototypes, self.classes = self._together(parts)
        missing = sorted(set(range(self.num_outputs)) - set(self.classes.tolist()))
        if missing:
            raise UserError(
                f"No patch of the {len(self._seen)} support images shows class {', '.join(map(str, missing))}. Choose "
                "support images that hold every class, or more of them (support=20)."
            )
        self.offsets = torch.zeros(self.num_outputs, device=self.mean.device)
        if self.calibrate:
            self.offsets = self._chosen_offsets(parts)
        self._seen = []

    def forward(self, features: Features) -> Tensor:
        """(B, num_outputs, h, w)."""
        maps = joined(features, self.in_channels)
        return self._scores(maps, self.prototypes, self.classes) + self.offsets[:, None, None]

    def _centred(self, maps: Tensor) -> Tensor:
        """(..., D, h, w) without the mean patch, of length 1."""
        return F.normalize(maps - self.mean[:, None, None], dim=-3)

    def _parts_of(self, seen: _Seen) -> _Parts:
        """What one support image brings to the prototypes."""
        maps = self._centred(seen.features)
        weights = seen.shares * seen.labelled  # (K, h, w)
        numbers = range(self.num_outputs) if self.grid else range(0)
        local = [self._local(maps, weights[number], seen.labelled) for number in numbers]
        classes = [torch.full((len(own),), number, device=maps.device) for number, own in enumerate(local)]
        nothing = maps.new_zeros(0, len(maps))
        return _Parts(
            sums=torch.einsum("khw,dhw->kd", weights, maps),
            local=torch.cat([nothing, *local]),
            classes=torch.cat([nothing[:, 0].long(), *classes]),
        )

    def _together(self, parts: Sequence[_Parts]) -> tuple[Tensor, Tensor]:
        """Prototypes (P, D) and their classes (P,)."""
        if not parts:
            return self.mean.new_zeros(0, len(self.mean)), self.classes.new_zeros(0)
        sums = torch.stack([part.sums for part in parts]).sum(dim=0)
        there = (sums.abs().sum(dim=1) > 0).nonzero()[:, 0]
        made = torch.cat([*(part.local for part in parts), sums[there]])
        return F.normalize(made, dim=1), torch.cat([*(part.classes for part in parts), there])

    def _local(self, maps: Tensor, weights: Tensor, labelled: Tensor) -> Tensor:
        """Means (n, D) over the cells that belong to a class."""
        size = (min(self.grid, int(weights.shape[0])), min(self.grid, int(weights.shape[1])))
        means = F.adaptive_avg_pool2d(maps * weights, size)
        share = F.adaptive_avg_pool2d(weights[None], size)[0]
        seen = F.adaptive_avg_pool2d(labelled[None], size)[0]
        return means[:, (share >= self.purity * seen) & (seen > 0.5)].T

    def _scores(self, maps: Tensor, prototypes: Tensor, classes: Tensor) -> Tensor:
        """(..., D, h, w) -> (..., K, h, w); -inf for a class without prototypes."""
        cosine = self.scale * torch.einsum("...dhw,pd->...phw", self._centred(maps), prototypes)
        scores = []
        for number in range(self.num_outputs):
            own = cosine[..., classes == number, :, :]
            if own.shape[-3] == 0:
                scores.append(torch.full_like(cosine[..., 0, :, :], -2 * self.scale))
            else:
                scores.append((own.softmax(dim=-3) * own).sum(dim=-3))
        return torch.stack(scores, dim=-3)

    def _chosen_offsets(self, parts: Sequence[_Parts]) -> Tensor:
        scores, shares = [], []
        groups = left_out_together([seen.source for seen in self._seen])
        for own, seen in zip(groups, self._seen, strict=True):
            of_others = self._together([part for group, part in zip(groups, parts, strict=True) if group != own])
            of_its_own = self._together([part for group, part in zip(groups, parts, strict=True) if group == own])
            lacking = ~torch.isin(of_its_own[1], of_others[1])
            prototypes = torch.cat([of_others[0], of_its_own[0][lacking]])
            classes = torch.cat([of_others[1], of_its_own[1][lacking]])
            scores.append(self._scores(seen.features, prototypes, classes).flatten(1))
            shares.append((seen.shares * seen.labelled).flatten(1))
        of_patches = torch.tensor(groups).repeat_interleave(torch.tensor([own.shape[1] for own in shares]))
        return best_offsets(torch.cat(scores, dim=1), torch.cat(shares, dim=1), of_patches.to(self.mean.device))
