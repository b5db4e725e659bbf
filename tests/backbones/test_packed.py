"""One pass over several resolutions equals a pass for each."""

import pytest
import torch

from dense_heads.backbones.packed import packed_forward
from dense_heads.backbones.vit import VisionTransformer


def tiny(**options):
    return VisionTransformer(
        12, 2, 2, num_registers=2, grid_size=4, interpolate_antialias=True, interpolate_offset=0.0, **options
    )


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(4, 3, 56, 56, generator=generator), torch.randn(6, 3, 28, 42, generator=generator)]
    return images, [torch.rand(4, 16, generator=generator) < 0.4, None]


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_packed_tokens_and_gradients_equal_separate_passes(batches, ffn):
    found = []
    for forward in (packed_forward, lambda vit, *inputs: vit(*inputs)):
        vit = tiny(ffn=ffn)
        outputs = forward(vit, *batches)
        sum(output["patch_tokens"].square().sum() + output["cls_token"].sum() for output in outputs).backward()
        found.append((outputs, {name: p.grad for name, p in vit.named_parameters()}))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        for key, tokens in theirs.items():
            torch.testing.assert_close(ours[key], tokens, rtol=1e-5, atol=1e-5)
    for name, gradient in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], gradient, rtol=1e-4, atol=1e-4)


def test_no_image_sees_another(batches):
    images, masks = batches
    vit = tiny().eval()
    before = packed_forward(vit, images, masks)
    changed = [images[0].clone(), images[1]]
    changed[0][2] += 1
    after = packed_forward(vit, changed, masks)
    same = [0, 1, 3]
    assert torch.allclose(before[0]["cls_token"][same], after[0]["cls_token"][same], atol=1e-6)
    assert torch.allclose(before[1]["cls_token"], after[1]["cls_token"], atol=1e-6)
    assert not torch.allclose(before[0]["cls_token"][2], after[0]["cls_token"][2], atol=1e-3)


def test_checkpointing_changes_nothing_but_memory(batches):
    gradients = []
    for checkpointing in (False, True):
        vit = tiny(checkpointing=checkpointing)
        packed_forward(vit, *batches)[1]["cls_token"].sum().backward()
        gradients.append(vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_stochastic_depth_keeps_the_mean(rate):
    vit = tiny(drop_path=rate)
    images = [torch.randn(8, 3, 28, 28, generator=torch.Generator().manual_seed(1))]
    torch.manual_seed(0)
    first = vit.blocks[0]
    tokens = vit._embed(images[0], None).detach()
    from dense_heads.backbones import packed

    branch = first.ls1(first.attn(first.norm1(tokens)))
    mean = torch.stack(
        [packed._residual(first, [tokens], lambda x: [first.ls1(first.attn(first.norm1(x[0])))])[0] for _ in range(400)]
    ).mean(0)
    torch.testing.assert_close(mean, tokens + branch, rtol=0.0, atol=0.25 * float(branch.detach().abs().max()))
