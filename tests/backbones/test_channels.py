import pytest
import torch

from dense_heads.backbones.channels import adapt_channels
from dense_heads.backbones.weights import load_backbone, save_backbone
from dense_heads.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    backbone = load_backbone("vitn14_reg", weights=None)
    return backbone, save_backbone(backbone, tmp_path_factory.mktemp("w") / "w.safetensors")


@pytest.mark.parametrize("num", [1, 2, 5])
def test_equal_channels_give_what_one_grey_picture_gave(saved, num):
    backbone, path = saved
    grey = torch.randn(2, 1, 28, 42)
    expected = backbone(grey.expand(-1, 3, -1, -1))["patch_tokens"]
    adapted = load_backbone("vitn14_reg", weights=path, in_channels=num)
    assert adapted.in_channels == num and adapted.fingerprint() != backbone.fingerprint()
    torch.testing.assert_close(adapted(grey.expand(-1, num, -1, -1))["patch_tokens"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num", [1, 4])
def test_summed_weights_let_the_answers_of_channels_add_up(saved, num):
    backbone, path = saved
    adapted = load_backbone("vitn14_reg", weights=path, in_channels=num, channel_weights="sum")
    one = torch.zeros(1, num, 14, 14)
    one[:, -1] = torch.randn(14, 14)  # only one channel speaks
    embedded = [
        vit.patch_embed(images) for vit, images in ((adapted, one), (backbone, one[:, -1:].expand(-1, 3, -1, -1)))
    ]
    torch.testing.assert_close(*embedded, atol=1e-5, rtol=1e-5)


def test_three_channels_are_left_as_they_are_and_unknown_policies_refused(saved):
    state = saved[0].state_dict()
    assert adapt_channels(state, 3, "mean") is state
    with pytest.raises(UserError, match="mean"):
        adapt_channels(state, 4, "mena")
    with pytest.raises(UserError, match="mean"):
        load_backbone("vitn14_reg", weights=saved[1], in_channels=2, channel_weights="first")
