"""Weighted k-nearest-neighbour classification: Wu et al. 2018 (arXiv 1805.01978) as in DINOv2's eval/knn.py."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.07
CHUNK = 256  # queries at a time


def knn_probabilities(
    queries: Tensor,
    bank: Tensor,
    classes: Tensor,
    num_classes: int,
    ks: Sequence[int],
    temperature: float = TEMPERATURE,
) -> dict[int, Tensor]:
    """For each k the class weights (Q, num_classes) of the queries' k most similar bank features.

    Args:
        queries: (Q, D); L2-normalised here.
        bank: (M, D); likewise.
        classes: (M,) of the bank.
        num_classes: K.
        ks: as the original, the weights softmax(similarity / T) are taken over the largest k before the first k count.
        temperature: T.
    """
    largest = min(max(ks), len(bank))
    queries, bank = F.normalize(queries.float(), dim=-1), F.normalize(bank.float(), dim=-1)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in torch.split(queries, CHUNK):
        similarity, index = (part @ bank.T).topk(largest, dim=-1, largest=True, sorted=True)
        votes = F.one_hot(classes[index], num_classes) * (similarity / temperature).softmax(dim=-1).unsqueeze(-1)
        for k in ks:
            found[k].append(votes[:, :k].sum(1))
    return {k: torch.cat(parts) for k, parts in found.items()}
