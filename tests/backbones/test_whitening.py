"""The whitened start: what goes into the first block has equal weight in all directions."""

import copy

import pytest
import torch

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.whitening import POSITION_STD, start_whitened


def tiny():
    return VisionTransformer(32, 2, 2, interpolate_antialias=True, interpolate_offset=0.0, grid_size=4, seed=0)


@pytest.fixture(scope="module")
def patches():
    """(5000, 588), as one-sided as pictures are: mostly brightness, and three weaker patterns."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.tensor([20.0, 2.0, 1.0, 0.5])
    patterns = torch.linalg.qr(torch.randn(588, 4, generator=generator)).Q
    noise = 0.02 * torch.randn(5000, 588, generator=generator)
    return 1.0 + (torch.randn(5000, 4, generator=generator) * strength) @ patterns.T + noise


def test_strong_patterns_of_patches_come_out_equally_strong(patches):
    vit = tiny()
    images = patches.view(-1, 3, 14, 14)
    with torch.no_grad():
        before = torch.linalg.eigvalsh(torch.cov(vit.patch_embed(images).flatten(0, 1).T))
        start_whitened(vit, patches, seed=0)
        after_tokens = vit.patch_embed(images).flatten(0, 1)
    after = torch.linalg.eigvalsh(torch.cov(after_tokens.T))
    assert before[-1] / before[-2] > 50  # the test can fail
    assert after[-1] == pytest.approx(1.0, abs=0.1) and after[-1] / after[-2] < 5
    assert after_tokens.mean(0).abs().max() < 1e-3


def test_places_are_told_apart_and_depend_on_the_seed_alone(patches):
    first, second, other = tiny(), tiny(), tiny()
    state = torch.random.get_rng_state()
    for vit, seed in ((first, 0), (second, 0), (other, 1)):
        start_whitened(vit, patches, seed)
    assert torch.equal(state, torch.random.get_rng_state())
    places = first.pos_embed[0, 1:].detach()
    assert float(places.std()) == pytest.approx(POSITION_STD, rel=0.05)
    assert torch.cdist(places, places).fill_diagonal_(9).min() > 0.1
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.pos_embed, other.pos_embed)


def test_what_is_neither_projection_nor_position_stays(patches):
    vit = tiny()
    before = copy.deepcopy(vit.state_dict())
    start_whitened(vit, patches, seed=0)
    changed = {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}
    linear = {f"blocks.{i}.{part}.weight" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert changed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", *linear}
    assert torch.equal(vit.pos_embed[:, 0], before["pos_embed"][:, 0])
    assert float(vit.blocks[0].mlp.fc1.weight.detach().std()) == pytest.approx((0.5 / 32) ** 0.5 * 0.88, rel=0.15)
