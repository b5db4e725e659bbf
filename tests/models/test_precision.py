"""How a frozen backbone is run: precision, images in a pass, compilation."""

import json

import pytest
import torch

from dense_heads.__main__ import main
from dense_heads.backbones.weights import load_backbone, save_backbone
from dense_heads.errors import UserError
from dense_heads.heads.linear import LinearHead
from dense_heads.models.dense import FrozenBackbone
from dense_heads.ops.precision import resolve_precision
from tests.factories import make_ade20k


def maps(frozen, images):
    levels = frozen(images, [frozen.request(LinearHead([192] * 4, 2, blocks="last4"))])
    return torch.stack(list(levels.float().patch_maps.values()))


def test_bfloat16_is_near_float32_and_has_its_fingerprint():
    backbone = load_backbone("vitn14_reg", None)
    full, half = FrozenBackbone(backbone), FrozenBackbone(backbone, precision="bfloat16")
    images = torch.randn(2, 3, 42, 56)
    expected, found = maps(full, images), maps(half, images)
    error = (found - expected).norm() / expected.norm()
    assert 1e-5 < error < 2e-2
    assert half.fingerprint() == full.fingerprint() == backbone.fingerprint()
    assert backbone.cls_token.dtype == torch.float32 and half.backbone.cls_token.dtype == torch.bfloat16
    head = LinearHead([192], 2).eval()
    assert half.predict_all(images, [head])[0].dtype == torch.float32


def test_a_streamed_backbone_computes_in_float32_with_rounded_weights(monkeypatch, tmp_path):
    monkeypatch.setattr("dense_heads.ops.precision.is_native", lambda: False)
    monkeypatch.setattr("dense_heads.backbones.layers.cpu_has_avx512", lambda: True)  # whole layers are laid out there
    images = torch.randn(2, 3, 42, 56)
    rounded = load_backbone("vitn14_reg", None)
    file = save_backbone(rounded, tmp_path / "weights.safetensors")
    original = rounded.fingerprint()
    for parameter in rounded.blocks.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected = maps(FrozenBackbone(rounded), images)
    made = {"random": load_backbone("vitn14_reg", None, streamed=True)}
    made["loaded"] = load_backbone("vitn14_reg", file, streamed=True)
    made["changed"] = load_backbone("vitn14_reg", file)
    for name, backbone in made.items():
        frozen = FrozenBackbone(backbone, precision="streamed")
        torch.testing.assert_close(maps(frozen, images), expected, rtol=1e-5, atol=1e-5)
        assert all(p.dtype == torch.bfloat16 for p in frozen.backbone.blocks.parameters())
        assert not any("_laid_out" in vars(layer) for layer in frozen.modules())  # nothing is left in float32
        assert (frozen.fingerprint() == original) == (name != "random") and frozen.precision == "streamed"


def test_where_the_processor_has_bfloat16_streamed_is_that(monkeypatch):
    monkeypatch.setattr("dense_heads.ops.precision.is_native", lambda: True)
    frozen = FrozenBackbone(load_backbone("vitn14_reg", None), precision="streamed")
    assert frozen.precision == "bfloat16" and frozen.backbone.cls_token.dtype == torch.bfloat16


def test_one_image_in_a_pass_gives_the_same_bits_in_any_batch():
    frozen = FrozenBackbone(load_backbone("vitn14_reg", None), pass_size=1)
    images = torch.randn(5, 3, 42, 56)
    together = maps(frozen, images)
    assert all(torch.equal(together[:, i : i + 1], maps(frozen, images[i : i + 1])) for i in range(5))
    for size in (2, 5, 7):
        torch.testing.assert_close(
            maps(FrozenBackbone(frozen.backbone, pass_size=size), images), together, rtol=1e-4, atol=1e-4
        )


def test_auto_is_what_the_processor_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native}, raising=False)
        assert resolve_precision("auto") == (torch.bfloat16 if native else torch.float32)


@pytest.mark.parametrize("wrong", [{"precision": "float8"}, {"pass_size": 0}, {"pass_size": 1.5}])
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UserError, match=f"backbone.{next(iter(wrong))}"):
        FrozenBackbone(load_backbone("vitn14_reg", None), **wrong)


def test_pixels_have_nothing_to_compute_in_half_precision():
    assert FrozenBackbone(load_backbone("pixels", None), precision="bfloat16").dtype == torch.float32


def test_a_run_says_what_it_computed_in_and_is_used_again(tmp_path):
    data, run = make_ade20k(tmp_path / "data"), tmp_path / "run"
    command = [
        "task=ade20k", f"data.root={data}", "backbone=vitn14_reg", "backbone.weights=null",
        "data.image_size=42", "data.batch_size=2", "data.num_workers=0", "debug=fast", "head=linear",
    ]  # fmt: skip
    assert main([*command, f"run_dir={run}"]) == 0
    assert json.loads((run / "metrics.json").read_text())["backbone"]["precision"] == "float32"  # as published
    half = tmp_path / "half"
    assert main([*command, "backbone.precision=bfloat16", "backbone.pass_size=1", f"run_dir={half}"]) == 0
    assert json.loads((half / "metrics.json").read_text())["backbone"]["precision"] == "bfloat16"
    images = data / "images" / "validation"
    assert main(["mode=predict", f"model={half}", f"input={images}", f"output={tmp_path / 'out'}"]) == 0
    assert main(["mode=evaluate", f"model={half}", "backbone.precision=float32"]) == 0
