"""The ViT's own behaviour: call forms, blocks, masks, stochastic depth, caches. Values: test_parity.py."""

import copy

import pytest
import torch
from torch import nn

from dense_heads.backbones.layers import drop_path, subset_residual
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.weights import load_backbone
from dense_heads.errors import UserError


def tiny(**options):
    options = {"num_registers": 2, "interpolate_antialias": True, "interpolate_offset": 0.0, "grid_size": 5} | options
    vit = VisionTransformer(32, 4, 2, **options).eval()
    with torch.no_grad():  # positions and tokens large enough to matter in the output
        for parameter in (vit.pos_embed, vit.cls_token, vit.mask_token):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return vit


@pytest.fixture
def images():
    return torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(0))


def test_forward_gives_the_tokens_of_the_contract(images):
    vit = tiny()
    out = vit(images)
    assert {key: tuple(value.shape) for key, value in out.items()} == {
        "cls_token": (2, 32),
        "register_tokens": (2, 2, 32),
        "patch_tokens": (2, 12, 32),
        "prenorm": (2, 15, 32),
    }
    normed = vit.norm(out["prenorm"])
    torch.testing.assert_close(normed[:, 0], out["cls_token"])
    torch.testing.assert_close(normed[:, 1:3], out["register_tokens"])
    torch.testing.assert_close(normed[:, 3:], out["patch_tokens"])


def test_patches_are_in_row_order_and_registers_have_no_position():
    vit = tiny(num_registers=2, grid_size=3)
    entered = []
    vit.blocks[0].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    images = torch.zeros(1, 3, 42, 42)
    images[0, :, 0:14, 14:28] = 1.0  # second patch of the first row
    vit(images)
    vit(torch.zeros(1, 3, 42, 42))
    moved = (entered[0] - entered[1]).abs().sum(-1)[0]
    assert moved.nonzero().flatten().tolist() == [1 + 2 + 1]
    torch.testing.assert_close(entered[0][:, 1:3], vit.register_tokens)
    torch.testing.assert_close(entered[0][:, :1], vit.cls_token + vit.pos_embed[:, :1])


def test_a_list_of_crops_equals_one_call_for_each(images):
    vit = tiny()
    small = images[:1, :, :28, :28]
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, 2] = True
    results = vit([images, small], [None, mask])
    for result, expected in zip(results, [vit(images), vit(small, mask)], strict=True):
        for key in expected:
            assert torch.equal(result[key], expected[key])
    assert not torch.equal(results[1]["cls_token"], vit(small)["cls_token"])
    with pytest.raises(UserError, match="2 batches of images with 1 masks"):
        vit([images, small], [mask])


def test_masked_patches_do_not_reach_the_output(images):
    vit = tiny()
    mask = torch.zeros(2, 12, dtype=torch.bool)
    mask[:, 5] = True  # row 1, column 1
    other = images.clone()
    other[:, :, 14:28, 14:28] += 5.0
    assert not torch.allclose(vit(images)["prenorm"], vit(other)["prenorm"])
    assert torch.equal(vit(images, mask)["prenorm"], vit(other, mask)["prenorm"])
    for wrong in (mask[:, :-1], mask.float()):
        with pytest.raises(UserError, match=r"expected bool of shape \(2, 12\)"):
            vit(images, wrong)


def test_intermediate_layers_forms(images):
    vit = tiny()
    raw = vit.block_outputs(images, [3, 1])
    assert sorted(raw) == [1, 3]
    for norm in (True, False):
        pairs = vit.get_intermediate_layers(images, n=[3, 1], reshape=True, return_class_token=True, norm=norm)
        for (patches, cls), block in zip(pairs, (1, 3), strict=True):  # ascending, whatever was asked
            tokens = vit.norm(raw[block]) if norm else raw[block]
            torch.testing.assert_close(cls, tokens[:, 0])
            assert patches.shape == (2, 32, 3, 4) and patches.is_contiguous()
            torch.testing.assert_close(patches[:, :, 2, 1], tokens[:, 1 + 2 + 2 * 4 + 1])
    last_two = vit.get_intermediate_layers(images, n=2)
    torch.testing.assert_close(last_two[1], vit(images)["patch_tokens"])
    torch.testing.assert_close(last_two[0], vit.norm(vit.block_outputs(images, [2])[2])[:, 3:])


@pytest.mark.parametrize("blocks", [[], [1, 1], [4], [-1]])
def test_blocks_that_do_not_exist(images, blocks):
    with pytest.raises(UserError, match="number of blocks"):
        tiny().get_intermediate_layers(images, n=blocks)


@pytest.mark.parametrize("n", [0, 5])
def test_too_many_or_no_last_blocks(images, n):
    with pytest.raises(UserError, match="4 blocks"):
        tiny().get_intermediate_layers(images, n=n)


def test_nothing_deeper_than_asked_for_is_computed(images):
    vit = tiny()
    ran = []
    for index, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    vit.norm.register_forward_hook(lambda *_: ran.append("norm"))
    vit.get_intermediate_layers(images, n=[0, 2], norm=False)
    assert ran == [0, 1, 2]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 28, 28), "unsqueeze"),
        (torch.zeros(1, 3, 28, 28, dtype=torch.uint8), "normalised"),
        (torch.zeros(1, 4, 28, 28), "in_channels"),
        (torch.zeros(1, 3, 10, 28), "smaller than one patch"),
        (torch.zeros(1, 3, 0, 28), "0 x 28"),
    ],
)
def test_images_of_a_wrong_form_are_named(images, message):
    with pytest.raises(UserError, match=message):
        tiny()(images)


def test_patch_fit_policies(images):
    odd = torch.randn(1, 3, 40, 50)
    vit = tiny(patch_fit="crop")
    assert torch.equal(vit(odd)["patch_tokens"], vit(odd[:, :, 6:34, 4:46])["patch_tokens"])
    vit.patch_fit = "pad"
    padded = nn.functional.pad(odd, (3, 3, 1, 1))
    assert torch.equal(vit(odd)["patch_tokens"], vit(padded)["patch_tokens"])
    assert vit.fit(odd)[1] == (3, 1, 3, 1)
    assert vit.get_intermediate_layers(odd, reshape=True)[0].shape[2:] == (3, 4)
    assert vit(torch.zeros(1, 3, 5, 5))["patch_tokens"].shape[1] == 1
    vit.patch_fit = "resize"
    resized = nn.functional.interpolate(odd, size=(42, 56), mode="bilinear", align_corners=False)
    torch.testing.assert_close(vit(odd)["patch_tokens"], vit(resized)["patch_tokens"])
    with pytest.raises(UserError, match="crop"):
        tiny(patch_fit="croop")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ffn": "swiglufused"}, "swiglu"), ({"drop_path": 1.0}, "drop_path"), ({"grid_size": 0}, "1 or more")],
)
def test_impossible_values_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        tiny(**options)


def test_other_channel_counts():
    out = tiny(in_channels=5)(torch.randn(1, 5, 28, 28))
    assert out["cls_token"].isfinite().all()


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_checkpointing_changes_no_gradient(images, ffn, rate):
    gradients = []
    for checkpointing in (False, True):
        vit = tiny(ffn=ffn, checkpointing=checkpointing, drop_path=rate).train()
        torch.manual_seed(0)
        out = vit(images)
        (out["cls_token"].sum() + out["patch_tokens"].square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in vit.named_parameters()})
    assert gradients[0]["blocks.0.attn.qkv.weight"].abs().sum() > 0
    for name, gradient in gradients[0].items():
        if gradient is None:
            assert name == "mask_token" and gradients[1][name] is None
        else:
            torch.testing.assert_close(gradients[1][name], gradient)


def test_checkpointing_keeps_fewer_activations(images):
    def saved(checkpointing):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            tiny(checkpointing=checkpointing).train()(images)
        return sum(sizes)

    assert saved(True) < 0.5 * saved(False)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 2, 3), 0.1)
    per_sample = dropped.flatten(1)
    assert per_sample.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert (per_sample == per_sample[:, :1]).all()
    assert dropped.mean() == pytest.approx(1.0, abs=0.02)


def test_subset_version_adds_the_scaled_residual_to_the_chosen_samples_only():
    seen = []

    def branch(x):
        seen.append(len(x))
        return torch.ones_like(x)

    out = subset_residual(torch.zeros(10, 2, 3), branch, 0.4)
    assert seen == [6]
    assert sorted(out[:, 0, 0].tolist()) == pytest.approx([0.0] * 4 + [10 / 6] * 6)
    subset_residual(torch.zeros(1, 2, 3), branch, 0.9)
    assert seen == [6, 1]


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_stochastic_depth_acts_in_training_only(images, rate):
    vit, plain = tiny(drop_path=rate), tiny()
    assert torch.equal(vit(images)["prenorm"], plain(images)["prenorm"])
    batches = []
    vit.train()
    vit.blocks[0].attn.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    many = images[:1].expand(40, -1, -1, -1)
    outputs = vit(many)["prenorm"]
    assert len({tuple(row) for row in outputs[:, 0, :2].tolist()}) > 1  # equal images, other paths
    assert batches == ([24] if rate == 0.4 else [40])  # computed for the chosen part alone above 0.1


def test_drop_path_rates_uniform_or_rising():
    assert [block.drop_rate for block in tiny(drop_path=0.3).blocks] == [0.3] * 4
    rising = [block.drop_rate for block in tiny(drop_path=0.3, drop_path_uniform=False).blocks]
    assert rising == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_positions_follow_the_weights(images):
    # The frozen backbone keeps interpolated positions: every way to change the weights must be seen.
    vit = tiny().requires_grad_(False)
    vit(images)

    @torch.no_grad()  # or it would take the route that gradients need
    def fresh():
        return copy.deepcopy(vit).requires_grad_(True)(images)["prenorm"]

    state = {key: value.clone() for key, value in vit.state_dict().items()}
    state["pos_embed"] = state["pos_embed"] * 2
    before = vit(images)["prenorm"]
    vit.load_state_dict(state)
    assert not torch.allclose(vit(images)["prenorm"], before)
    assert torch.equal(vit(images)["prenorm"], fresh())

    nn.Sequential(vit).load_state_dict({f"0.{key}": value for key, value in state.items()}, assign=True)
    assert torch.equal(vit(images)["prenorm"], fresh())

    with torch.no_grad():
        vit.pos_embed.mul_(0.5)  # as an EMA teacher is updated
    assert torch.equal(vit(images)["prenorm"], fresh())

    nn.Sequential(vit).to(torch.bfloat16)
    assert vit(images)["prenorm"].dtype == torch.bfloat16
    assert torch.equal(vit(images)["prenorm"], fresh())


def test_positions_are_interpolated_once_per_size_while_frozen_only(images, monkeypatch):
    vit = tiny()
    calls = []
    original = VisionTransformer._interpolate
    monkeypatch.setattr(
        VisionTransformer, "_interpolate", lambda self, h, w: calls.append((h, w)) or original(self, h, w)
    )
    vit(images)
    vit(images)
    assert len(calls) == 2  # it may learn
    vit.requires_grad_(False)
    with torch.inference_mode():
        vit(images)
    vit(images)
    assert len(calls) == 3
    vit(images.requires_grad_())["cls_token"].sum().backward()  # what was kept in inference mode serves a gradient
    assert images.grad.abs().sum() > 0
    vit(images[..., :28])
    assert len(calls) == 4
    vit.blocks[2].ls1.gamma.requires_grad_(True)
    vit(images)
    assert len(calls) == 5
    vit.requires_grad_(False).train()
    vit(images)
    assert len(calls) == 6


def test_positions_of_many_sizes_do_not_fill_the_memory():
    vit = tiny().requires_grad_(False)
    state = list(vit.state_dict())
    for width in range(1, 41):
        vit(torch.zeros(1, 3, 14, 14 * width))
    assert len(vit._positions) <= 16
    assert list(vit.state_dict()) == state


def test_both_ways_of_interpolation_differ_and_meet_at_the_stored_grid():
    images = torch.randn(1, 3, 42, 84)
    square = torch.randn(1, 3, 70, 70)
    reg, plain = tiny(), tiny(interpolate_antialias=False, interpolate_offset=0.1)
    assert not torch.allclose(reg(images)["prenorm"], plain(images)["prenorm"], atol=1e-3)
    assert torch.equal(reg(square)["prenorm"], plain(square)["prenorm"])
    assert reg.position(5, 5, torch.float32) is reg.pos_embed
    # As many patches as the stored grid in another form are not the stored grid.
    four = tiny(grid_size=4)
    assert not torch.allclose(four.position(2, 8, torch.float32), four.pos_embed)


def test_offset_interpolation_gives_the_right_size_everywhere():
    vit = tiny(interpolate_antialias=False, interpolate_offset=0.1, grid_size=37).requires_grad_(False)
    for side in range(1, 120):
        assert vit.position(side, 3, torch.float32).shape[1] == 1 + 3 * side


def test_fingerprint_names_architecture_and_weights():
    first, same = tiny(), tiny()
    fingerprint = first.fingerprint()
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert same.fingerprint() == fingerprint
    assert tiny(interpolate_offset=0.1).fingerprint() != fingerprint
    with torch.no_grad():
        first.blocks[3].mlp.fc2.bias[0] += 1e-3
    assert first.fingerprint() != fingerprint
    first.load_state_dict(same.state_dict())
    assert first.fingerprint() == fingerprint
    assert first.to(torch.bfloat16).fingerprint() != fingerprint


def test_random_weights_follow_the_seed_and_leave_the_global_generator():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (load_backbone("vitn14_reg", weights=None, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert not first.training
    weights = first.state_dict()
    assert (weights["blocks.3.ls1.gamma"] == 1).all() and (weights["blocks.0.norm1.weight"] == 1).all()
    assert (weights["mask_token"] == 0).all() and (weights["blocks.0.attn.qkv.bias"] == 0).all()
    assert weights["blocks.7.mlp.fc1.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["pos_embed"].std() == pytest.approx(0.02, rel=0.02)
    assert weights["register_tokens"].std() == pytest.approx(1e-6, rel=0.1)
    assert weights["patch_embed.proj.weight"].abs().max() <= 1 / 588**0.5


def test_autocast_and_half_precision(images):
    vit = tiny().requires_grad_(False)
    reference = vit(images)["prenorm"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = vit(images)["prenorm"]
        assert vit.blocks[0].mlp.fc1(torch.zeros(1, 32)).dtype == torch.bfloat16
    assert mixed.dtype == torch.float32  # the residual stream stays in full precision, as in the original
    torch.testing.assert_close(mixed, reference, atol=0.1, rtol=0.1)
    assert vit.to(torch.bfloat16)(images)["prenorm"].dtype == torch.bfloat16


@pytest.mark.parametrize("tokens", [1, 7, 459, 460, 461, 1370])
def test_attention_in_bfloat16_is_that_of_float64(tokens):
    from dense_heads.backbones.layers import attention

    query, key, value = torch.randn(3, 2, 3, tokens, 16).bfloat16()
    expected = torch.softmax(query.double() @ key.double().mT / 4, dim=-1) @ value.double()
    with torch.no_grad():
        found = attention(query, key, value)
    assert found.dtype == torch.bfloat16
    assert (found.double() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_linear_layers_follow_their_weights_laid_out_or_not(dtype, tolerance, gelu, avx512, monkeypatch):
    from dense_heads.backbones.layers import Linear

    monkeypatch.setattr("dense_heads.backbones.layers.cpu_has_avx512", lambda: avx512)
    linear = Linear(24, 40).to(dtype).requires_grad_(False)
    x = torch.randn(2, 5, 24).to(dtype)
    for _ in range(2):
        expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
        expected = nn.functional.gelu(expected) if gelu else expected
        torch.testing.assert_close(linear(x, gelu).double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(copy.deepcopy(linear)(x, gelu), linear(x, gelu))
        linear.weight.mul_(-3)
    with_gradient = linear(x, gelu)
    torch.testing.assert_close(linear.requires_grad_(True)(x, gelu), with_gradient, rtol=tolerance, atol=tolerance)
    linear(x, gelu).sum().backward()
    assert linear.weight.grad is not None


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_bfloat16_without_units_for_it_is_computed_in_float32(images, with_gradients, avx512, monkeypatch):
    vit = tiny().requires_grad_(with_gradients)
    rounded = copy.deepcopy(vit).bfloat16().float()
    expected = rounded(images)["prenorm"]
    monkeypatch.setattr("dense_heads.backbones.layers.cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("dense_heads.backbones.layers.cpu_has_avx512", lambda: avx512)
    products = torch.nn.functional.linear
    operands = []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: operands.append(x.dtype) or products(x, *rest))
    found = vit.bfloat16()(images)["prenorm"]
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() / expected.norm() < 1e-2
    assert torch.bfloat16 not in operands and (len(operands) > 0) == (with_gradients or not avx512)
    if with_gradients:
        found.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.blocks[0].attn.parameters())


def test_the_first_batch_does_not_decide_the_bits_of_later_ones():
    block = tiny().blocks[0].requires_grad_(False)
    small, large = (torch.randn(batch, 17, block.norm1.normalized_shape[0]) for batch in (1, 40))
    other = copy.deepcopy(block)
    expected = block(large)
    other(small)
    assert torch.equal(other(large), expected)
