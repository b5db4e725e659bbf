"""The raw-pixel baseline keeps the contract of a backbone."""

import pytest
import torch

from dense_heads.backbones.weights import load_backbone
from dense_heads.backbones.zoo import get_spec, resolve_blocks
from dense_heads.errors import UserError


def test_tokens_are_the_pixels_of_the_patches():
    backbone = load_backbone("pixels")
    images = torch.randn(2, 3, 28, 42)
    out = backbone(images)
    assert out["patch_tokens"].shape == (2, 6, 588) and out["register_tokens"].shape == (2, 0, 588)
    assert backbone.embed_dim == get_spec("pixels").embed_dim == 588
    torch.testing.assert_close(out["patch_tokens"][:, 4], images[:, :, 14:28, 14:28].flatten(1))
    torch.testing.assert_close(out["cls_token"], out["patch_tokens"].mean(1))


def test_heads_on_several_blocks_get_the_same_map_each():
    backbone = load_backbone("pixels", weights=None, patch_fit="pad")
    images = torch.randn(1, 3, 20, 30)
    blocks = resolve_blocks(backbone.name, "even4")
    outputs = backbone.block_outputs(images, blocks)
    assert set(outputs) == set(blocks) and len(blocks) == 4
    assert all(torch.equal(tokens, outputs[blocks[0]]) for tokens in outputs.values())
    maps = backbone.get_intermediate_layers(images, n=blocks, reshape=True)
    assert [tuple(patch_map.shape) for patch_map in maps] == [(1, 588, 2, 3)] * 4


def test_no_parameters_no_weights_one_fingerprint():
    backbone = load_backbone("pixels")
    assert not list(backbone.parameters()) and not backbone.state_dict()
    assert backbone.fingerprint() == load_backbone("pixels").fingerprint()
    assert backbone.fingerprint() != load_backbone("pixels", in_channels=1).fingerprint()
    with pytest.raises(UserError, match="has none"):
        load_backbone("pixels", weights="somewhere.pth")
    with pytest.raises(UserError, match="mask"):
        backbone(torch.zeros(1, 3, 14, 14), torch.zeros(1, 1, dtype=torch.bool))


def test_position_says_where_a_patch_is_and_nothing_else():
    backbone = load_backbone("position", None)
    tokens = backbone(torch.randn(2, 3, 42, 56))["patch_tokens"]
    assert tokens.shape == (2, 12, 64)
    torch.testing.assert_close(tokens[0], tokens[1])
    distances = torch.cdist(tokens[0], tokens[0])
    assert (distances + 1e3 * torch.eye(12) > 0.1).all()  # every place has its own
    both = load_backbone("pixels_position", None)(torch.ones(1, 3, 42, 56))["patch_tokens"]
    assert both.shape == (1, 12, 652) == (1, 12, load_backbone("pixels_position").embed_dim)
    torch.testing.assert_close(both[..., 588:], tokens[:1])


def test_every_channel_of_position_tells_patches_apart_on_every_grid():
    for side in range(5, 75):  # 70 to 1036 pixels
        tokens = load_backbone("position", None)(torch.zeros(1, 3, 14 * side, 14 * side))["patch_tokens"][0]
        assert tokens.std(dim=0).min() > 0.1, side
