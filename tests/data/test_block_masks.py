"""Masks of iBOT: shares, blocks, and independence of the number of processes."""

import numpy as np
import pytest

from dense_heads.data.block_masks import batch_masks, block_mask


def test_half_of_the_crops_are_masked_with_evenly_spread_shares():
    masks = batch_masks(64, (16, 16), seed=0, step=0)
    shares = masks.mean(1)
    assert (shares > 0).sum() == 32
    found = np.sort(shares[shares > 0])
    edges = np.linspace(0.1, 0.5, 33)
    assert (found <= edges[1:] + 1e-9).all()  # a mask may fall short of its share, never exceed it
    assert found[-1] > 0.4 and found[0] < 0.12 and np.median(found) == pytest.approx(0.3, abs=0.05)


def test_masks_are_a_function_of_seed_and_step():
    assert np.array_equal(batch_masks(8, (8, 8), 1, 5), batch_masks(8, (8, 8), 1, 5))
    assert not np.array_equal(batch_masks(8, (8, 8), 1, 5), batch_masks(8, (8, 8), 1, 6))


@pytest.mark.parametrize("target", [0, 1, 5, 60, 128])
def test_a_mask_never_exceeds_its_target_and_comes_in_blocks(target):
    rng = np.random.default_rng(target)
    masks = [block_mask(16, 16, target, rng) for _ in range(20)]
    counts = [int(mask.sum()) for mask in masks]
    assert max(counts) <= target
    if target >= 60:
        assert np.mean(counts) > 0.85 * target
        neighbours = np.mean([(mask[1:] & mask[:-1]).sum() / mask.sum() for mask in masks])
        assert neighbours > 0.6  # scattered points would have their share of the image, at most a half
