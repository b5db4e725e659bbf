"""Dense nearest-neighbour retrieval: a patch is what the most similar labelled patches are."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.training_free import TrainingFreeHead, joined, label_of, patch_shares
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch, Features

INDICES = ("torch", "faiss")
_AT_ONCE = 2**24  # similarities in memory


class PatchKNNHead(TrainingFreeHead):
    """A bank of labelled patch features; the k nearest by cosine vote for each patch; no training.

    As in-context scene understanding by retrieval (Balazevic et al., NeurIPS 2023): votes are weighted by the softmax
    of cosine / temperature, a neighbour votes with the shares of the classes in it. Outputs are log-probabilities.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: classes.
        blocks: which blocks, by a name that `backbones/zoo.py` resolves.
        norm: whether the backbone's final norm is applied.
        k: neighbours.
        temperature: of their weights.
        max_patches: of the bank; of more a part is kept, drawn by a fixed seed.
        centre: take the bank's mean patch out before comparing.
        index: `torch`, exact, where the features are; `faiss` (an extra), exact too, on the processor.

    Raises:
        UserError: arguments out of range, or faiss is not installed; in `conclude`: no labelled patch was seen.
    """

    mean: Tensor
    bank: Tensor
    votes: Tensor

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
        self.k, self.temperature, self.max_patches, self.centre, self.index = k, temperature, max_patches, centre, index
        self._searcher: Any = _faiss(1) if index == "faiss" else None  # fails here where it is not installed
        width = sum(self.in_channels)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("bank", torch.zeros(0, width))  # (N, D) of length 1
        self.register_buffer("votes", torch.zeros(0, num_outputs))  # (N, K)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def observe(self, features: Features, batch: Batch) -> None:
        """Take in images and their `mask` (B, H, W): the patches of which at least half is labelled."""
        shares, labelled = patch_shares(label_of(batch), self.num_outputs, features)
        kept = labelled > 0.5  # (B, h, w)
        patches = joined(features, self.in_channels).permute(0, 2, 3, 1)[kept]
        self._seen.append((patches, shares.permute(0, 2, 3, 1)[kept]))

    def conclude(self) -> None:
        """Make the bank."""
        bank = torch.cat([patches for patches, _ in self._seen]) if self._seen else self.bank[:0]
        if len(bank) == 0:
            raise UserError("head=patch_knn has seen no labelled patch. Set support=20, or name images: support=[ID].")
        votes = torch.cat([shares for _, shares in self._seen])
        if len(bank) > self.max_patches:
            generator = torch.Generator().manual_seed(stable_seed("bank", len(bank)))
            chosen = torch.randperm(len(bank), generator=generator)[: self.max_patches].sort().values.to(bank.device)
            bank, votes = bank[chosen], votes[chosen]
        self.mean = bank.mean(dim=0) if self.centre else torch.zeros_like(self.mean, device=bank.device)
        self.bank, self.votes = F.normalize(bank - self.mean, dim=1), votes
        self._seen, self._searcher = [], _faiss(1) if self.index == "faiss" else None

    def forward(self, features: Features) -> Tensor:
        """(B, num_outputs, h, w), log-probabilities."""
        maps = joined(features, self.in_channels)
        batch, _, rows, columns = maps.shape
        queries = F.normalize(maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]) - self.mean, dim=1)
        probabilities = torch.cat([self._voted(part) for part in torch.split(queries, self._chunk())])
        logs = probabilities.clamp(min=1e-6).log()
        return logs.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2)

    def _chunk(self) -> int:
        return max(1, _AT_ONCE // max(1, len(self.bank)))

    def _voted(self, queries: Tensor) -> Tensor:
        """(n, D) -> (n, K)."""
        similarity, neighbours = self._nearest(queries)
        weights = (similarity / self.temperature).softmax(dim=1)
        return torch.einsum("nk,nkc->nc", weights, self.votes[neighbours].float())

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
