"""What features are worth without training anything: k-NN accuracy (facts sheet 3.3) and rank.

RankMe: Garrido et al. 2023 (arXiv 2210.02885).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dense_heads.errors import UserError
from dense_heads.ops.across import gathered_rows
from dense_heads.ops.neighbours import TEMPERATURE, knn_probabilities


def rank_me(features: Tensor) -> float:
    """The effective rank of (M, D) features: the exponential of the entropy of their normalised singular values."""
    values = torch.linalg.svdvals(features.float())
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    return float((-(shares * shares.log()).sum()).exp())


class NeighbourProbe:
    """Collects features of a labelled bank and of queries, and says what they are worth."""

    def __init__(self, ks: Sequence[int] = (10, 20, 100, 200), temperature: float = TEMPERATURE) -> None:
        """`ks`: numbers of neighbours; the first one's accuracy stands for the probe."""
        if not ks or min(ks) < 1:
            raise UserError(f"k-NN with k of {list(ks)}; expected one or more numbers of at least 1.")
        self.ks, self.temperature = tuple(ks), temperature
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.kept: dict[str, list[tuple[Tensor, Tensor]]] = {"bank": [], "query": []}

    def add(self, part: str, features: Tensor, classes: Tensor) -> None:
        """(B, D) features with their classes (B,), to `bank` or `query`."""
        self.kept[part].append((features.float().cpu(), classes.cpu()))

    def measure(self) -> dict[str, float]:
        """`knn<k>_top1` for each k, and `rank` (RankMe of bank and queries, centred nowhere), over all processes."""
        bank, bank_classes = self._joined("bank")
        queries, classes = self._joined("query")
        num_classes = int(torch.cat((bank_classes, classes)).max()) + 1
        found = {}
        for k, votes in knn_probabilities(queries, bank, bank_classes, num_classes, self.ks, self.temperature).items():
            found[f"knn{k}_top1"] = float((votes.argmax(1) == classes).float().mean())
        found["rank"] = rank_me(torch.cat((bank, queries)))
        return found

    def _joined(self, part: str) -> tuple[Tensor, Tensor]:
        if not self.kept[part]:
            raise UserError(f"The k-NN probe has no images for its {part}; look at task.probe.")
        features, classes = (torch.cat(list(parts)) for parts in zip(*self.kept[part], strict=True))
        return gathered_rows(features), gathered_rows(classes)
