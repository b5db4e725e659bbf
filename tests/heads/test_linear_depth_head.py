from pathlib import Path

import hydra.utils
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from dense_heads.errors import UserError
from dense_heads.heads.linear_depth import LinearDepthHead
from dense_heads.structures import Features

CONF = Path(__file__).parents[2] / "conf" / "head"


def features(*widths: int, grid: tuple[int, int] = (3, 5), batch: int = 2, scale: float = 1.0) -> Features:
    generator = torch.Generator().manual_seed(len(widths))
    maps = tuple(scale * torch.randn(batch, width, *grid, generator=generator) for width in widths)
    tokens = tuple(scale * torch.randn(batch, width, generator=generator) for width in widths)
    return Features(patch_maps=maps, cls_tokens=tokens, image_size=(14 * grid[0], 14 * grid[1]))


def as_published(head: LinearDepthHead, seen: Features, bins: np.ndarray) -> np.ndarray:
    """Written in the original's order: cls behind the patches, up-sampled, concatenated, convolved, normalised."""
    levels = []
    for map, cls in zip(seen.patch_maps, seen.cls_tokens, strict=True):
        both = torch.cat([map, cls[:, :, None, None].expand_as(map)], dim=1).double()
        levels.append(F.interpolate(both, scale_factor=4, mode="bilinear", align_corners=False))
    weight = head.conv_depth.weight[:, :, 0, 0].detach().double().numpy()
    bias = head.conv_depth.bias.detach().double().numpy()
    logits = np.einsum("kc,bchw->bkhw", weight, torch.cat(levels, dim=1).numpy()) + bias[:, None, None]
    if head.normalisation == "linear":
        shares = np.maximum(logits, 0) + 0.1
    elif head.normalisation == "softmax":
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    else:
        shares = 1 / (1 + np.exp(-logits))
    shares /= shares.sum(axis=1, keepdims=True)
    return (shares * bins[:, None, None]).sum(axis=1, keepdims=True)


@pytest.mark.parametrize("widths", [(12,), (12, 12, 12, 12), (6, 10)])
@pytest.mark.parametrize("normalisation", ["linear", "softmax", "sigmoid"])
def test_depth_is_the_mean_of_bins_in_the_originals_order(widths, normalisation):
    torch.manual_seed(0)
    head = LinearDepthHead(widths, normalisation=normalisation, num_bins=32)
    seen = features(*widths, scale=3.0)
    expected = as_published(head, seen, np.linspace(0.001, 10.0, 32))
    depth = head(seen)
    assert depth.shape == (2, 1, 12, 20)
    assert depth.dtype == torch.float32
    np.testing.assert_allclose(depth.detach().numpy(), expected, rtol=1e-5)
    assert depth.std() > 0.01  # not one number everywhere


def test_logarithmic_bins_have_equal_ratios():
    torch.manual_seed(0)
    head = LinearDepthHead([8], bins="log", min_m=0.5, max_m=8.0, num_bins=5)
    np.testing.assert_allclose(head.bin_depths.numpy(), [0.5, 1.0, 2.0, 4.0, 8.0], rtol=1e-6)
    seen = features(8)
    np.testing.assert_allclose(head(seen).detach(), as_published(head, seen, 0.5 * 2.0 ** np.arange(5)), rtol=1e-5)


def test_the_range_is_the_heads_own_and_scales_its_depths():
    torch.manual_seed(0)
    near, far = LinearDepthHead([8], max_m=10.0), LinearDepthHead([8], max_m=80.0)
    far.load_state_dict(near.state_dict())  # bins are not in it
    seen = features(8)
    # Bins are linear in the range, so depth is too: the hub's slip makes depths about 8 times as large.
    share = (near(seen) - 0.001) / (10.0 - 0.001)
    torch.testing.assert_close(far(seen), 0.001 + share * (80.0 - 0.001), rtol=1e-5, atol=1e-5)


def test_depth_stays_within_the_range_whatever_the_features():
    head = LinearDepthHead([8], min_m=1.0, max_m=2.0, num_bins=4, normalisation="softmax")
    with torch.no_grad():
        head.conv_depth.weight.zero_()
        head.conv_depth.bias.copy_(torch.tensor([1e4, 0.0, 0.0, 0.0]))
        assert torch.equal(head(features(8)), torch.ones(2, 1, 12, 20))
        head.conv_depth.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1e4]))
        assert torch.equal(head(features(8)), torch.full((2, 1, 12, 20), 2.0))


def test_under_bf16_autocast_depth_is_float32_and_near():
    torch.manual_seed(0)
    head = LinearDepthHead([32] * 4, blocks="even4")
    seen = features(32, 32, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = head(seen)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, head(seen), rtol=0.02, atol=0)
    rough.sum().backward()
    assert torch.isfinite(head.conv_depth.weight.grad).all()


def test_learns_a_ramp():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 6), torch.linspace(0, 1, 8), indexing="ij")
    seen = Features((torch.stack([rows, columns])[None],), (torch.zeros(1, 2),), (84, 112))
    target = 1 + 4 * F.interpolate(columns[None, None], scale_factor=4, mode="bilinear")
    head = LinearDepthHead([2])
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(150):
        loss = (head(seen) - target).abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_outputs": 19}, "19 outputs"),
        ({"num_bins": 1}, "num_bins=1"),
        ({"bins": "uniforn"}, "'uniforn'.*Did you mean 'uniform'"),
        ({"normalisation": "relu"}, "There are: linear, sigmoid, softmax"),
        ({"min_m": 5.0, "max_m": 5.0}, "min_m < max_m"),
        ({"min_m": -1.0}, r"min_m=-1\.0"),
        ({"max_m": float("inf")}, "max_m=inf"),
        ({"max_m": float("nan")}, "max_m=nan"),
        ({"max_m": "far"}, "max_m='far'"),
        ({"bins": "log", "min_m": 0}, "no bin at"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        LinearDepthHead([6], **arguments)


@pytest.mark.parametrize(("option", "blocks"), [("linear_depth", "last"), ("linear4_depth", "even4")])
@pytest.mark.parametrize(("task", "max_m"), [({"depth_range": {"min_m": 0.001, "max_m": 80.0}}, 80.0), ({}, 10.0)])
def test_options_make_the_official_heads_with_the_tasks_range(option, blocks, task, max_m):
    config = OmegaConf.create({"task": task, "head": OmegaConf.load(CONF / f"{option}.yaml")})
    assert config.head.pop("weights") is None and config.head.pop("range") is None  # build takes them out
    head = hydra.utils.instantiate(config.head)(in_channels=[6], num_outputs=1)
    assert isinstance(head, LinearDepthHead)
    assert (head.blocks, head.norm, head.normalisation) == (blocks, False, "linear")
    assert (head.min_m, head.max_m, len(head.bin_depths)) == (0.001, max_m, 256)
    assert torch.equal(head.bin_depths, torch.linspace(0.001, max_m, 256))
