"""Dense nearest-neighbour retrieval: a patch is what the most similar labelled patches are."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.errors import UserError, unknown_name
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
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch, Features

INDICES = ("torch", "faiss")
_AT_ONCE = 2**24  # similarities in memory
_CALIBRATED_ON = 2**14  # patches of the bank


class PatchKNNHead(TrainingFreeHead):
    """A bank of labelled patch features; the k nearest by cosine vote for each patch; no training.

    As in-context scene understanding by retrieval (Balazevic et al., NeurIPS 2023): votes are weighted by the softmax
    of cosine / temperature, a neighbour votes with the shares of the classes in it.

    Outputs are log-probabilities and, of all classes but the first, an offset each. Where a class is rare most
    neighbours of its patches show another one, the more so the larger the bank, and a majority would never find it:
    the offsets are chosen on the support (`best_offsets`), each of its images (slice: volume) predicted by the patches
    of the others, and by its own other patches of a class that no other shows.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: classes.
        blocks: which blocks, by a name that `backbones/zoo.py` resolves.
        norm: whether the backbone's final norm is applied.
        k: neighbours.
        temperature: of their weights.
        max_patches: of the bank; of more a part is kept, drawn by a fixed seed.
        centre: take the bank's mean patch out before comparing.
        calibrate: whether offsets are chosen, on at most 16,384 patches of the bank.
        index: `torch`, exact, where the features are; `faiss` (an extra), exact too, on the processor.

    Raises:
        UserError: arguments out of range, or faiss is not installed; in `conclude`: no labelled patch was seen.
    """

    mean: Tensor
    bank: Tensor
    votes: Tensor
    offsets: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        k: int = 30,
        temperature: float = 0.05,
        max_patches: int = 200_000,
        centre: bool = True,
        calibrate: bool = True,
        index: str = "torch",
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if not (
            isinstance(k, int) and k >= 1 and temperature > 0 and isinstance(max_patches, int) and max_patches >= 1
        ):
            raise UserError(
                f"head.k={k}, head.temperature={temperature}, head.max_patches={max_patches}; expected whole numbers "
                "from 1 on, and a temperature above 0."
            )
        if index not in INDICES:
            raise unknown_name("head.index:", str(index), INDICES)
        self.k, self.temperature, self.max_patches, self.index = k, temperature, max_patches, index
        self.centre, self.calibrate = centre, calibrate
        self._searcher: Any = _faiss(1) if index == "faiss" else None  # fails here where it is not installed
        width = sum(self.in_channels)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("bank", torch.zeros(0, width))  # (N, D) of length 1
        self.register_buffer("votes", torch.zeros(0, num_outputs))  # (N, K)
        self.register_buffer("offsets", torch.zeros(num_outputs))
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._sources: list[Source] = []

    def observe(self, features: Features, batch: Batch) -> None:
        """Take in images and their `mask` (B, H, W): the patches of which at least half is labelled."""
        shares, labelled = patch_shares(label_of(batch), self.num_outputs, features)
        kept = labelled > 0.5  # (B, h, w)
        maps = joined(features, self.in_channels).permute(0, 2, 3, 1)
        self._sources += sources_of(batch, len(maps), len(self._seen))
        self._seen += [(map[own], share[:, own].T) for map, share, own in zip(maps, shares, kept, strict=True)]

    def conclude(self) -> None:
        """Make the bank and choose the offsets."""
        bank = torch.cat([patches for patches, _ in self._seen]) if self._seen else self.bank[:0]
        if len(bank) == 0:
            raise UserError("head=patch_knn has seen no labelled patch. Set support=20, or name images: support=[ID].")
        votes = torch.cat([shares for _, shares in self._seen])
        groups = torch.tensor(left_out_together(self._sources), device=bank.device)
        groups = groups.repeat_interleave(torch.tensor([len(own) for own, _ in self._seen], device=bank.device))
        chosen = _drawn(len(bank), self.max_patches).to(bank.device)
        bank, votes, groups = bank[chosen], votes[chosen], groups[chosen]
        self.mean = bank.mean(dim=0) if self.centre else torch.zeros_like(self.mean, device=bank.device)
        self.bank, self.votes = F.normalize(bank - self.mean, dim=1), votes
        self.offsets = torch.zeros(self.num_outputs, device=bank.device)
        if self.calibrate and len(bank) > 1:
            self.offsets = self._chosen_offsets(groups)
        self._seen, self._sources, self._searcher = [], [], _faiss(1) if self.index == "faiss" else None

    def forward(self, features: Features) -> Tensor:
        """(B, num_outputs, h, w), log-probabilities and offsets."""
        maps = joined(features, self.in_channels)
        batch, _, rows, columns = maps.shape
        queries = F.normalize(maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]) - self.mean, dim=1)
        logs = torch.cat([self._voted(*self._nearest(part)) for part in torch.split(queries, self._chunk())])
        return (logs + self.offsets).reshape(batch, rows, columns, -1).permute(0, 3, 1, 2)

    def _chunk(self) -> int:
        return max(1, _AT_ONCE // max(1, len(self.bank)))

    def _voted(self, similarity: Tensor, neighbours: Tensor) -> Tensor:
        """(n, k) each -> (n, K), log-probabilities."""
        weights = (similarity / self.temperature).softmax(dim=1)
        return torch.einsum("nk,nkc->nc", weights, self.votes[neighbours].float()).clamp(min=1e-6).log()

    def _chosen_offsets(self, groups: Tensor) -> Tensor:
        """`groups` (N,): patches of the bank that must not vote for each other."""
        asked = _drawn(len(self.bank), _CALIBRATED_ON).to(groups.device)
        alone = _shown_by_one(self.votes > 0, groups)
        itself = torch.arange(len(groups), device=groups.device)
        logs = []
        for part in torch.split(asked, self._chunk()):
            similarity = self.bank[part] @ self.bank.T
            silent = (groups[part][:, None] == groups) & ~alone
            similarity[silent | (part[:, None] == itself)] = -torch.inf
            nearest = similarity.topk(min(self.k, len(self.bank) - 1), dim=1)
            logs.append(self._voted(nearest.values, nearest.indices))
        return best_offsets(torch.cat(logs).T, self.votes[asked].T.float(), groups[asked])

    def _nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        k = min(self.k, len(self.bank))
        if self.index == "torch":
            nearest = (queries @ self.bank.T.to(queries.dtype)).topk(k, dim=1)
            return nearest.values, nearest.indices
        if self._searcher is None or self._searcher.ntotal != len(self.bank):
            self._searcher = _faiss(self.bank.shape[1])
            self._searcher.add(self.bank.float().cpu().numpy())
        similarity, neighbours = self._searcher.search(queries.float().cpu().numpy(), k)
        return torch.from_numpy(similarity).to(queries.device), torch.from_numpy(neighbours).to(queries.device)


def _shown_by_one(shown: Tensor, groups: Tensor) -> Tensor:
    """(N,): whether a patch shows a class that no other group shows; `shown` (N, K), `groups` (N,)."""
    _, group = torch.unique(groups, return_inverse=True)
    of_group = torch.zeros(int(group.max()) + 1, shown.shape[1], device=shown.device)
    once = (of_group.index_add(0, group, shown.float()) > 0).sum(dim=0) == 1
    return (shown & once).any(dim=1)


def _drawn(num: int, at_most: int) -> Tensor:
    """Ascending indices of all of `num`, or of a part drawn by a fixed seed."""
    generator = torch.Generator().manual_seed(stable_seed("bank", num))
    return torch.randperm(num, generator=generator)[:at_most].sort().values


def _faiss(width: int) -> Any:
    """An empty exact index of inner products."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            "head.index=faiss needs faiss, which is not installed: pip install 'dense-heads[medical]', or use "
            "head.index=torch (exact as well)."
        ) from error
    return faiss.IndexFlatIP(width)
