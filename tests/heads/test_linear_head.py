from pathlib import Path

import hydra.utils
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from dense_heads.errors import UserError
from dense_heads.heads.linear import LinearHead
from dense_heads.structures import Features

CONF = Path(__file__).parents[2] / "conf" / "head"


def features(*maps: torch.Tensor) -> Features:
    batch, _, height, columns = maps[0].shape
    tokens = tuple(torch.randn(batch, map.shape[1]) for map in maps)
    return Features(patch_maps=maps, cls_tokens=tokens, image_size=(14 * height, 14 * columns))


def test_parameters_are_the_official_ones():
    # facts 2.1: ViT-S, VOC2012 ms; the notebook prints conv_seg (21, 1536, 1, 1)
    head = LinearHead([384] * 4, 21, blocks="last4")
    assert {key: tuple(value.shape) for key, value in head.state_dict().items()} == {
        "bn.weight": (1536,),
        "bn.bias": (1536,),
        "bn.running_mean": (1536,),
        "bn.running_var": (1536,),
        "bn.num_batches_tracked": (),
        "conv_seg.weight": (21, 1536, 1, 1),
        "conv_seg.bias": (21,),
    }
    assert (head.bn.eps, head.bn.momentum) == (1e-5, 0.1)


def test_initial_weights_are_normal_001_and_bias_zero():
    torch.manual_seed(0)
    head = LinearHead([1024], 150)
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.conv_seg.weight.mean().abs() < 1e-4
    assert (head.conv_seg.bias == 0).all()
    assert LinearHead([1024], 150, init_std=0.1).conv_seg.weight.std().item() == pytest.approx(0.1, rel=0.02)


def test_forward_is_batch_norm_then_a_linear_layer_on_each_patch():
    torch.manual_seed(0)
    head = LinearHead([6, 6], 3, blocks="last4", init_std=1.0)
    torch.nn.init.normal_(head.bn.weight)
    torch.nn.init.normal_(head.bn.bias)
    maps = [3 + 2 * torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)]
    tokens = torch.cat(maps, dim=1).permute(0, 2, 3, 1).reshape(-1, 12)  # one row for each patch

    def by_hand(mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        normed = (tokens - mean) / (var + 1e-5).sqrt() * head.bn.weight + head.bn.bias
        logits = normed @ head.conv_seg.weight[:, :, 0, 0].T + head.conv_seg.bias
        return logits.view(2, 4, 5, 3).permute(0, 3, 1, 2)

    mean, var = tokens.mean(dim=0), tokens.var(dim=0, unbiased=False)
    torch.testing.assert_close(head.train()(features(*maps)), by_hand(mean, var), rtol=1e-4, atol=1e-5)
    # One step of momentum 0.1 from mean 0 and (unbiased) variance 1.
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * tokens.var(dim=0)
    head.eval()
    torch.testing.assert_close(head(features(*maps)), by_hand(running_mean, running_var), rtol=1e-4, atol=1e-5)


def test_levels_come_to_the_first_ones_size():
    torch.manual_seed(0)
    head = LinearHead([3, 3], 2).eval()
    first, second = torch.randn(1, 3, 6, 8), torch.randn(1, 3, 3, 4)
    wide = F.interpolate(second, size=(6, 8), mode="bilinear", align_corners=False)
    out = head(features(first, second))
    assert out.shape == (1, 2, 6, 8)
    assert torch.equal(out, head(features(first, wide)))


def test_dropout_takes_whole_channels_and_only_in_training():
    torch.manual_seed(0)
    head = LinearHead([8], 8, dropout=0.5)
    with torch.no_grad():  # each output shows one channel
        head.conv_seg.weight.copy_(torch.eye(8)[:, :, None, None])
    seen = features(torch.randn(4, 8, 5, 5))
    dropped = head.train()(seen).flatten(2).eq(0)
    assert torch.equal(dropped.all(dim=2), dropped.any(dim=2))
    assert 0 < dropped.all(dim=2).sum() < 32
    assert not head.eval()(seen).eq(0).any()


def test_maps_of_another_backbone_are_our_own_mistake():
    with pytest.raises(AssertionError, match=r"\(5,\).*\(6,\)"):
        LinearHead([6], 2)(features(torch.randn(1, 5, 4, 4)))


@pytest.mark.parametrize("arguments", [{"dropout": 1.0}, {"dropout": -0.1}, {"init_std": -1.0}])
def test_values_that_make_no_sense_are_refused(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        LinearHead([6], 2, **arguments)


@pytest.mark.parametrize(("option", "blocks"), [("linear", "last"), ("linear4", "last4")])
def test_options_make_the_official_heads(option, blocks):
    config = OmegaConf.load(CONF / f"{option}.yaml")
    assert config.pop("weights") is None  # build.py takes it out
    head = hydra.utils.instantiate(config)(in_channels=[6], num_outputs=2)
    assert isinstance(head, LinearHead)
    assert (head.blocks, head.norm, head.dropout.p) == (blocks, True, 0.0)
