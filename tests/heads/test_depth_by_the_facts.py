"""Whole depth models against a second computation, written from the description of the original and in its order.

Only the backbone's blocks are shared (they have parity tests of their own): padding, heads, range and resizing are
done again here, with plain functions, at sizes and with backbones that no recorded vector has.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dense_heads
from dense_heads.heads.dpt import DPTHead
from dense_heads.heads.linear_depth import LinearDepthHead

BLOCKS = {"vits14": (2, 5, 8, 11), "vitb14": (2, 5, 8, 11), "vitl14": (4, 11, 17, 23)}
WIDTHS = {"vits14": 384, "vitb14": 768, "vitl14": 1024}
SIZES = [(70, 98), (57, 131), (111, 45)]  # a multiple of 14; padded on both sides; an odd and an even grid
LARGE = [pytest.param(name, marks=pytest.mark.slow) for name in ("vitb14", "vitl14")]


def up(x, size):
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def double(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def levels(backbone, images, blocks):
    """Centre padding with zeros, then un-normed blocks with their cls tokens."""
    height, width = images.shape[-2:]
    more_y, more_x = -height % 14, -width % 14
    padded = F.pad(images, (more_x // 2, more_x - more_x // 2, more_y // 2, more_y - more_y // 2))
    return backbone.get_intermediate_layers(padded, n=blocks, reshape=True, return_class_token=True, norm=False)


def linear(backbone, images, state, blocks, min_m, max_m):
    pairs = levels(backbone, images, blocks)
    grid = [4 * side for side in pairs[0][0].shape[-2:]]
    parts = [up(torch.cat([m, c[:, :, None, None].expand_as(m)], dim=1), grid) for m, c in pairs]
    logits = F.conv2d(torch.cat(parts, dim=1), state["conv_depth.weight"], state["conv_depth.bias"])
    shares = logits.relu() + 0.1
    shares = shares / shares.sum(dim=1, keepdim=True)
    bins = torch.linspace(min_m, max_m, 256)
    depth = torch.einsum("bkhw,k->bhw", shares, bins)[:, None]
    return up(depth.clamp(min_m, max_m), images.shape[-2:])[:, 0]


def dpt(backbone, images, state, blocks, min_m, max_m):
    def conv(x, name, bias=True, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"] if bias else None, **options)

    def residual(x, name):
        y = conv(x.relu(), f"{name}.conv1.conv", bias=False, padding=1)
        return x + conv(y.relu(), f"{name}.conv2.conv", bias=False, padding=1)

    pyramid = []
    for k, (m, c) in enumerate(levels(backbone, images, blocks)):
        (height, width), tokens = m.shape[-2:], m.flatten(2).transpose(1, 2)
        name = f"reassemble_blocks.readout_projects.{k}.0"
        both = torch.cat([tokens, c[:, None].expand_as(tokens)], dim=-1)
        read = F.gelu(F.linear(both, state[f"{name}.weight"], state[f"{name}.bias"]))
        x = conv(read.transpose(1, 2).unflatten(2, (height, width)), f"reassemble_blocks.projects.{k}.conv")
        name = f"reassemble_blocks.resize_layers.{k}"
        if k < 2:
            x = F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=(4, 2)[k])
        elif k == 3:
            x = conv(x, name, stride=2, padding=1)
        pyramid.append(conv(x, f"convs.{k}.conv", bias=False, padding=1))
    fused = None
    for k, x in enumerate(reversed(pyramid)):
        if fused is not None:
            x = fused + residual(up(x, fused.shape[-2:]), f"fusion_blocks.{k}.res_conv_unit1")
        x = double(residual(x, f"fusion_blocks.{k}.res_conv_unit2"))
        fused = conv(x, f"fusion_blocks.{k}.project.conv")
    x = conv(fused, "project.conv", padding=1).relu()
    x = double(conv(x, "conv_depth.head.0", padding=1))
    x = conv(conv(x, "conv_depth.head.2", padding=1).relu(), "conv_depth.head.4")
    return up((x.relu() + min_m).clamp(min_m, max_m), images.shape[-2:])[:, 0]


HEADS = {
    "linear_depth": (lambda width: LinearDepthHead([width]), linear),
    "linear4_depth": (lambda width: LinearDepthHead([width] * 4), linear),
    "dpt": (lambda width: DPTHead([width] * 4, min_m=0.001, max_m=10.0), dpt),
}
FILES = {"linear_depth": "linear", "linear4_depth": "linear4", "dpt": "dpt"}


@pytest.mark.parametrize("backbone_name", ["vits14", *LARGE])
def test_released_heads_give_what_the_description_says(tmp_path, backbone_name):
    width = WIDTHS[backbone_name]
    backbone = dense_heads.load_backbone(backbone_name, None)
    for name, (make, compute) in HEADS.items():
        torch.manual_seed(len(name))
        head = make(width)
        state = {key: torch.randn_like(value) / value[0].numel() ** 0.5 for key, value in head.state_dict().items()}
        if name == "dpt":
            state["conv_depth.head.4.bias"] += 3  # away from the last relu, which would hide everything
        file = tmp_path / f"dinov2_{backbone_name}_nyu_{FILES[name]}_head.pth"
        torch.save({"state_dict": {f"decode_head.{key}": value for key, value in state.items()}}, file)
        blocks = BLOCKS[backbone_name][-1:] if name == "linear_depth" else BLOCKS[backbone_name]
        for asked, largest in ((None, 10.0), ("hub", 10.0 if name == "dpt" else 80.0)):
            model = dense_heads.load_head(name, backbone=backbone, weights=file, range=asked).eval()
            for size in SIZES[1:] if asked is None else SIZES[:1]:
                images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
                with torch.no_grad():
                    ours = model(images)
                    theirs = compute(backbone, images, state, blocks, 0.001, largest)
                assert theirs.std() > 0.005 and ours.shape == (2, *size)
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_a_picture_is_predicted_as_its_normalised_tensor(tmp_path):
    head = LinearDepthHead([384])
    torch.save({f"decode_head.{key}": value for key, value in head.state_dict().items()}, tmp_path / "nyu_head.pth")
    backbone = dense_heads.load_backbone("vits14", None)
    model = dense_heads.load_head("linear_depth", backbone=backbone, weights=tmp_path / "nyu_head.pth")
    image = np.random.default_rng(0).integers(0, 255, (40, 61, 3), dtype=np.uint8)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    batch = torch.from_numpy(((image - mean) / std).transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        expected = linear(backbone, batch, head.state_dict(), (11,), 0.001, 10.0)[0]
    np.testing.assert_allclose(model.predict(image), expected.numpy(), rtol=1e-4)
