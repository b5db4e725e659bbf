"""k-NN and RankMe against plain loops."""

import math

import pytest
import torch

from dense_heads.errors import UserError
from dense_heads.metrics.neighbours import NeighbourProbe, knn_probabilities, rank_me


def test_knn_is_the_weighted_vote_written_out():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 5, generator=generator), torch.randn(7, 5, generator=generator)
    classes = torch.randint(0, 3, (30,), generator=generator)
    found = knn_probabilities(queries, bank, classes, 3, ks=(2, 10))
    for q, query in enumerate(queries):
        ranked = sorted(
            ((float(query @ b / query.norm() / b.norm()), int(c)) for b, c in zip(bank, classes, strict=True)),
            reverse=True,
        )[:10]
        total = sum(math.exp(s / 0.07) for s, _ in ranked)  # over the largest k, as the original
        for k in (2, 10):
            votes = [sum(math.exp(s / 0.07) / total for s, c in ranked[:k] if c == label) for label in range(3)]
            assert found[k][q].tolist() == pytest.approx(votes, abs=1e-5)


def test_the_probe_reads_separable_features_and_a_small_bank():
    probe = NeighbourProbe(ks=(10, 200))
    classes = torch.arange(4).repeat(5)
    features = torch.eye(4)[classes] + 0.01 * torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    probe.add("bank", features, classes)
    probe.add("query", features[:8], classes[:8])
    assert probe.measure()["knn10_top1"] == 1.0
    probe.reset()
    with pytest.raises(UserError, match="bank"):
        probe.measure()


def test_rank_counts_the_directions_that_are_used():
    generator = torch.Generator().manual_seed(0)
    full = torch.linalg.qr(torch.randn(50, 8, generator=generator))[0]
    assert rank_me(full) == pytest.approx(8, rel=0.01)
    assert rank_me(torch.ones(50, 8)) == pytest.approx(1, abs=0.01)
