"""The sum of a detection head's own loss terms."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightedTerms(nn.Module):
    """Sum of named terms, each times its weight; 1 where none is given."""

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        """`weights`: by the names that a head's `terms` has."""
        super().__init__()
        self.weights = dict(weights or {})

    def forward(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Scalars by name -> a scalar."""
        return torch.stack([term * self.weights.get(name, 1.0) for name, term in terms.items()]).sum()
