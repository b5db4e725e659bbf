from pathlib import Path

import hydra.utils
import pytest
import torch
from omegaconf import OmegaConf

from dense_heads.errors import UserError
from dense_heads.heads.dpt import DPTHead
from dense_heads.structures import Features

CONF = Path(__file__).parents[2] / "conf" / "head"
SMALL = {"channels": 16, "head_channels": 8}


def features(width: int = 32, grid: tuple[int, int] = (3, 5), batch: int = 2) -> Features:
    generator = torch.Generator().manual_seed(0)
    maps = tuple(torch.randn(batch, width, *grid, generator=generator) for _ in range(4))
    tokens = tuple(torch.randn(batch, width, generator=generator) for _ in range(4))
    return Features(patch_maps=maps, cls_tokens=tokens, image_size=(14 * grid[0], 14 * grid[1]))


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 5), (4, 6), (7, 2)])
def test_any_grid_of_patches_will_do(grid):
    torch.manual_seed(0)
    head = DPTHead([32] * 4, num_outputs=3, **SMALL)
    out = head(features(grid=grid))
    height, width = (32 * ((side + 1) // 2) for side in grid)
    assert out.shape == (2, 3, height, width)
    assert torch.isfinite(out).all()


def huggingface_dpt(head: DPTHead, width: int):
    """The same head in transformers, an implementation of other hands, with the same weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.dpt.modeling_dpt import DPTDepthEstimationHead, DPTNeck

    backbone = transformers.Dinov2Config(hidden_size=width, num_attention_heads=2, num_hidden_layers=4)
    config = transformers.DPTConfig(
        backbone_config=backbone,
        hidden_size=width,
        neck_hidden_sizes=[width // 8, width // 4, width // 2, width],
        fusion_hidden_size=256,
        reassemble_factors=[4, 2, 1, 0.5],
        use_bias_in_fusion_residual=False,
        add_projection=True,
        readout_type="project",
        head_in_index=-1,
    )
    neck, output = DPTNeck(config).eval(), DPTDepthEstimationHead(config).eval()
    names = {"convs.": "convs.", "fusion_blocks.": "fusion_stage.layers.", "reassemble_blocks.": "reassemble_stage."}
    inner = {
        "res_conv_unit1": "residual_layer1",
        "res_conv_unit2": "residual_layer2",
        "conv1.conv": "convolution1",
        "conv2.conv": "convolution2",
        "project.conv": "projection",
    }
    of_neck, of_output = {}, {}
    for key, value in head.state_dict().items():
        if key.startswith("conv_depth."):
            of_output[key.removeprefix("conv_depth.")] = value
        elif key.startswith("project."):
            of_output[key.replace("project.conv", "projection")] = value
        else:
            prefix = next(prefix for prefix in names if key.startswith(prefix))
            key = names[prefix] + key.removeprefix(prefix)
            if prefix == "convs.":
                key = key.replace(".conv.", ".")
            for ours, theirs in inner.items():
                key = key.replace(ours, theirs)
            parts = key.split(".")
            if parts[1] in ("projects", "resize_layers"):  # reassemble_stage.projects.0.conv.weight
                kind = "projection" if parts[1] == "projects" else "resize"
                key = ".".join(["reassemble_stage.layers", parts[2], kind, parts[-1]])
            of_neck[key] = value
    wrong = neck.load_state_dict(of_neck, strict=False)
    assert not wrong.unexpected_keys
    assert all("layers.0.residual_layer1" in key for key in wrong.missing_keys)  # there, but never used
    output.load_state_dict(of_output, strict=True)
    return neck, output


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_equals_the_dpt_of_transformers(grid):
    torch.manual_seed(0)
    head = DPTHead([32] * 4, min_m=0.0, max_m=1e6).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(2)  # new weights flatten everything to a constant, which would hide a mistake
        head.conv_depth.last.bias.fill_(50.0)
    seen = features(grid=grid)
    neck, output = huggingface_dpt(head, 32)
    tokens = [
        torch.cat([cls[:, None], map.flatten(2).transpose(1, 2)], dim=1)
        for map, cls in zip(seen.patch_maps, seen.cls_tokens, strict=True)
    ]
    with torch.no_grad():
        ours = head(seen)[:, 0]
        theirs = output(neck(tokens, *grid))
    assert ours.min() > 0 and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * ours.std().item())


def test_metres_with_a_range_and_raw_outputs_without():
    torch.manual_seed(0)
    raw = DPTHead([32] * 4, **SMALL)
    seen, last = features(), raw.conv_depth.last
    with torch.no_grad():
        logits = raw.eval()(seen)
        last.bias.sub_(logits.mean()).div_(logits.std())
        last.weight.div_(logits.std())
        logits = raw(seen)
    metres = DPTHead([32] * 4, min_m=0.5, max_m=1.5, **SMALL)
    metres.load_state_dict(raw.state_dict())
    with torch.no_grad():
        assert (logits < 0).any() and (logits > 1).any()  # all three parts of the curve are there
        assert torch.equal(metres.eval()(seen), logits.clamp(min=0).add(0.5).clamp(max=1.5))
        assert torch.equal(metres.train()(seen), logits.clamp(min=0).add(0.5))  # not cut, so that it can come back


def test_every_seed_starts_alive():
    for seed in range(10):
        torch.manual_seed(seed)
        head = DPTHead([32] * 4, min_m=0.001, max_m=10.0, **SMALL)
        depth = head(features())
        assert depth.mean().item() == pytest.approx(2.5, abs=0.5)
        depth.mean().backward()
        without = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert without == []


@pytest.mark.parametrize("readout", ["ignore", "add", "project"])
def test_readouts_do_what_they_say(readout):
    torch.manual_seed(0)
    head = DPTHead([32] * 4, readout=readout, **SMALL).eval()
    assert any("readout" in key for key in head.state_dict()) == (readout == "project")
    seen = features()
    other = Features(seen.patch_maps, tuple(2 * cls for cls in seen.cls_tokens), seen.image_size)
    assert torch.equal(head(seen), head(other)) == (readout == "ignore")
    if readout == "add":
        moved = tuple(m + c[:, :, None, None] for m, c in zip(seen.patch_maps, seen.cls_tokens, strict=True))
        nothing = tuple(torch.zeros_like(cls) for cls in seen.cls_tokens)
        assert torch.equal(head(seen), head(Features(moved, nothing, seen.image_size)))


def test_widths_are_options():
    head = DPTHead([32] * 4, num_outputs=5, channels=12, post_channels=[3, 6, 9, 10], head_channels=7)
    shapes = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    assert [shapes[f"reassemble_blocks.projects.{k}.conv.weight"][0] for k in range(4)] == [3, 6, 9, 10]
    assert shapes["convs.3.conv.weight"] == (12, 10, 3, 3)
    assert shapes["conv_depth.head.0.weight"] == (6, 12, 3, 3)
    assert shapes["conv_depth.head.2.weight"] == (7, 6, 3, 3)
    assert shapes["conv_depth.head.4.weight"] == (5, 7, 1, 1)
    assert head(features()).shape[1] == 5


def test_batch_norm_stands_in_the_residual_units_only():
    head = DPTHead([32] * 4, batch_norm=True, **SMALL)
    normed = {key.rsplit(".", 2)[0] for key in head.state_dict() if "running_mean" in key}
    assert len(normed) == 2 * 7  # fusion block 0 has one unit, the others two, each of two convolutions
    assert all("res_conv_unit" in key for key in normed)
    before = head.fusion_blocks[1].res_conv_unit1.conv1.bn.running_mean.clone()
    head.train()(features())
    assert not torch.equal(head.fusion_blocks[1].res_conv_unit1.conv1.bn.running_mean, before)
    plain = DPTHead([32] * 4, **SMALL)
    assert plain.state_dict().keys() == {key for key in head.state_dict() if ".bn." not in key}


def test_under_bf16_autocast_depth_is_float32_and_near():
    torch.manual_seed(0)
    head = DPTHead([32] * 4, min_m=0.001, max_m=10.0, **SMALL)
    seen = features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = head(seen)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, head(seen), rtol=0.02, atol=0)
    assert len(rough.unique()) > 1000  # bfloat16 has some 64 values between 2 and 3 m
    rough.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": [32], "blocks": "last"}, r"head\.blocks=last gives 1 block"),
        ({"readout": "projekt"}, "'projekt'.*Did you mean 'project'"),
        ({"min_m": 0.001}, "expected both in metres"),
        ({"max_m": 10.0}, "expected both in metres"),
        ({"min_m": 10.0, "max_m": 1.0}, "min_m < max_m"),
        ({"num_outputs": 150, "min_m": 0.001, "max_m": 10.0}, "150 outputs"),
        ({"post_channels": [8, 8]}, r"post_channels=\[8, 8\]"),
        ({"post_channels": [8, 8, 8, 0]}, "post_channels"),
        ({"channels": 1}, "channels=1"),
        ({"head_channels": 0}, "head_channels=0"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        DPTHead(**{"in_channels": [32] * 4, **arguments})


@pytest.mark.parametrize(
    ("task", "num_outputs", "range_m"),
    [({"depth_range": {"min_m": 0.001, "max_m": 80.0}}, 1, (0.001, 80.0)), ({"num_classes": 150}, 150, None)],
)
def test_the_option_serves_depth_and_segmentation(task, num_outputs, range_m):
    config = OmegaConf.create({"task": task, "head": OmegaConf.load(CONF / "dpt.yaml")})
    assert config.head.pop("weights") is None and config.head.pop("range") is None  # build takes them out
    head = hydra.utils.instantiate(config.head)(in_channels=[16] * 4, num_outputs=num_outputs)
    assert isinstance(head, DPTHead)
    assert (head.blocks, head.norm, head.range_m) == ("even4", False, range_m)
    assert head.project.conv.weight.shape == (256, 256, 3, 3)
    assert head.eval()(features(16, batch=1)).shape == (1, num_outputs, 64, 96)
