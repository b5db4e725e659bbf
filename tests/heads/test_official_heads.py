import logging
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dense_heads.errors import UserError
from dense_heads.heads.linear import LinearHead
from dense_heads.heads.official import load_head_weights, official_head_url
from dense_heads.structures import Features


def trained(width: int = 384, blocks: int = 1, num_outputs: int = 21) -> LinearHead:
    """A head whose every tensor, running statistics included, differs from a fresh one."""
    head = LinearHead([width] * blocks, num_outputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*head.parameters(), head.bn.running_mean, head.bn.running_var]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        head.bn.num_batches_tracked.fill_(40_000)
    return head


def released(path: Path, head: LinearHead, **beside: object) -> Path:
    """A file as mmcv writes it and DINOv2's authors released it."""
    state = OrderedDict((f"decode_head.{key}", value) for key, value in head.state_dict().items())
    torch.save({"meta": {"CLASSES": ("a", "b"), "iter": 40_000}, "state_dict": state, **beside}, path)
    return path


def assert_loaded(head: LinearHead, like: LinearHead) -> None:
    for key, value in like.state_dict().items():
        assert torch.equal(head.state_dict()[key], value), key


@pytest.mark.parametrize("backbone", ["vits14", "dinov2_vits14"])
@pytest.mark.parametrize("blocks", [1, 4])
def test_released_heads_load_key_for_key(tmp_path, backbone, blocks):
    source, head = trained(blocks=blocks), LinearHead([384] * blocks, 21)
    kind = "linear" if blocks == 1 else "ms"
    path = released(tmp_path / f"dinov2_vits14_voc2012_{kind}_head.pth", source)
    load_head_weights(head, path, backbone, "voc2012")
    assert_loaded(head, source)
    maps = tuple(torch.randn(1, 384, 3, 3) for _ in range(blocks))
    seen = Features(patch_maps=maps, cls_tokens=tuple(map[:, :, 0, 0] for map in maps), image_size=(42, 42))
    assert torch.equal(head.eval()(seen), source.eval()(seen))


def test_numpy_scalars_beside_the_weights_do_not_matter(tmp_path):
    source, head = trained(), LinearHead([384], 21)
    scalars = [np.float64(0.4734), np.float32(1.5), np.int64(40_000), np.bool_(True)]
    path = released(tmp_path / "head.pth", source, best=scalars)
    with pytest.raises(Exception, match=r"numpy\.\S*scalar"):  # so this is no file that loads anyway
        torch.load(path, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    load_head_weights(head, path, "vits14")
    assert_loaded(head, source)
    assert set(torch.serialization.get_safe_globals()) == before  # nobody else's loading became laxer


def test_numpy_1_names_load_too(tmp_path):
    # What numpy 1 called numpy.core, numpy 2 writes as numpy._core: the same bytes but for the name and its length.
    source, head = trained(), LinearHead([384], 21)
    path = released(tmp_path / "head.pth", source, best=np.float64(0.5))
    old = tmp_path / "old.pth"
    with zipfile.ZipFile(path) as new, zipfile.ZipFile(old, "w") as out:
        for item in new.infolist():
            content = new.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"cnumpy._core.multiarray\n" in content
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            out.writestr(item, content)
    load_head_weights(head, old, "vits14")
    assert_loaded(head, source)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class HostileScalar:
    """Calls something else of numpy's, beside what is allowed."""

    def __reduce__(self):
        return np.frombuffer, (b"12345678", np.dtype("f8"))


@pytest.mark.parametrize("where", ["beside", "inside", "alone"])
def test_code_in_a_file_never_runs(tmp_path, where):
    trap = tmp_path / "trap"
    path = tmp_path / "head.pth"
    if where == "beside":
        released(path, trained(), best=Hostile(trap))
    else:
        torch.save(
            {"state_dict": {"decode_head.bn.weight": Hostile(trap)}} if where == "inside" else Hostile(trap), path
        )
    head = LinearHead([384], 21)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    with pytest.raises(UserError, match="could run code"):
        load_head_weights(head, path, "vits14")
    assert not trap.exists()
    assert all(torch.equal(head.state_dict()[key], value) for key, value in before.items())
    torch.load(path, weights_only=False)  # the trap itself works
    assert trap.exists()


def test_nothing_else_of_numpy_is_called(tmp_path):
    path = released(tmp_path / "head.pth", trained(), best=HostileScalar())
    with pytest.raises(UserError, match="could run code"):
        load_head_weights(LinearHead([384], 21), path, "vits14")


@pytest.mark.parametrize("as_folder", [False, True])
def test_own_artefacts_load_also_over_registers(tmp_path, as_folder):
    source, head = trained(), LinearHead([384], 21)
    path = tmp_path / "head.safetensors"
    safetensors.torch.save_file(source.state_dict(), path)
    load_head_weights(head, tmp_path if as_folder else str(path), "vits14_reg")
    assert_loaded(head, source)


def test_a_backbone_in_the_file_is_ignored_and_said(tmp_path, caplog):
    source, head = trained(), LinearHead([384], 21)
    state = {f"decode_head.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "backbone.cls_token": torch.zeros(1, 1, 384)}}, tmp_path / "whole.pth")
    with caplog.at_level(logging.WARNING):
        load_head_weights(head, tmp_path / "whole.pth", "vits14")
    assert_loaded(head, source)
    assert "1 backbone.* tensors are ignored" in caplog.text

    torch.save({"state_dict": {**state, "auxiliary_head.conv_seg.bias": torch.zeros(21)}}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"auxiliary_head\.conv_seg\.bias"):
        load_head_weights(head, tmp_path / "more.pth", "vits14")


@pytest.mark.parametrize("backbone", ["vits14_reg", "dinov2_vits14_reg", "vitn14_reg"])
def test_released_heads_are_refused_over_registers_with_the_reason(tmp_path, backbone):
    path = released(tmp_path / "head.pth", trained())
    with pytest.raises(UserError, match="without registers only; features of the register backbones are others"):
        load_head_weights(LinearHead([384], 21), path, backbone)
    with pytest.raises(UserError, match="without registers only"):
        official_head_url(backbone, "voc2012", "linear")


@pytest.mark.parametrize(
    ("file", "ours", "looks_like"),
    [
        ((768, 1, 150), (384, 1, 150), "ade20k, 150 classes, head=linear backbone=vitb14"),
        ((1024, 4, 21), (1024, 1, 21), "voc2012, 21 classes, head=linear4 backbone=vitl14"),
        ((384, 4, 21), (384, 1, 21), "head=linear4 backbone=vits14 or head=linear backbone=vitg14"),
        ((384, 1, 150), (384, 1, 19), "expected (19, 384, 1, 1) for 19 outputs on 1 block(s) of vits14"),
        ((50, 1, 7), (384, 1, 7), "looks like 7 classes, 50 channels"),
    ],
)
def test_shapes_that_do_not_fit_say_whose_they_look_like(tmp_path, file, ours, looks_like):
    path = released(tmp_path / "head.pth", trained(*file))
    with pytest.raises(UserError) as error:
        load_head_weights(LinearHead([ours[0]] * ours[1], ours[2]), path, "vits14")
    assert looks_like in str(error.value)


def test_the_file_of_another_data_set_is_refused(tmp_path):
    path = released(tmp_path / "head.pth", trained(num_outputs=150))
    head = LinearHead([384], 150)
    with pytest.raises(UserError, match=r"does not belong to voc2012, which has 21 classes.*ade20k, 150 classes"):
        load_head_weights(head, path, "vits14", "voc2012")
    load_head_weights(head, path, "vits14", "ade20k")
    with pytest.raises(UserError, match="ade20k"):
        load_head_weights(head, path, "vits14", "ade2k")


def test_equal_shapes_are_told_apart_by_the_files_name(tmp_path):
    # Four blocks of ViT-S and one of ViT-g: 1536 channels both.
    path = released(tmp_path / "dinov2_vits14_ade20k_ms_head.pth", trained(384, 4, 150))
    with pytest.raises(UserError, match=r"head=linear4 on backbone=vits14 for ade20k"):
        load_head_weights(LinearHead([1536], 150), path, "vitg14", "ade20k")
    load_head_weights(LinearHead([384] * 4, 150), path, "vits14", "ade20k")


def test_broken_files(tmp_path):
    head = LinearHead([384], 21)
    whole = released(tmp_path / "whole.pth", trained()).read_bytes()

    def refused(content: bytes | object, match: str, name: str = "head.pth") -> None:
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(UserError, match=match):
            load_head_weights(head, path, "vits14")

    refused(whole[: len(whole) // 2], "damaged or cut short")
    refused(b"", "damaged or cut short")
    refused(b"<html>404</html>", "damaged or cut short")
    refused(b"no safetensors", "damaged or cut short", "head.safetensors")
    refused(torch.zeros(3), "holds no weights")
    refused({}, "holds no weights")
    refused({"state_dict": [1]}, "holds no weights")
    refused({"state_dict": {"decode_head.bn.weight": 3}}, r"decode_head\.bn\.weight that are no tensors")
    refused({"epoch": 3, "model": {}}, "epoch, model that are no tensors")

    state = trained().state_dict()
    refused(
        {key: value for key, value in state.items() if key != "bn.running_var"},
        r"1 keys are missing \(bn.running_var\)",
    )
    refused({**state, "conv_depth.bias": torch.zeros(1)}, r"1 are unknown \(conv_depth\.bias\)")
    refused({**state, "conv_seg.bias": torch.full((21,), float("nan"))}, r"not finite in conv_seg\.bias")
    refused({**state, "bn.weight": torch.ones(3)}, r"bn\.weight is \(3,\), expected \(384,\)")
    with pytest.raises(UserError, match="no head weights file"):
        load_head_weights(head, tmp_path / "absent.pth", "vits14")
    with pytest.raises(UserError, match=r"no head weights file .*head\.safetensors"):
        (tmp_path / "run").mkdir()
        load_head_weights(head, tmp_path / "run", "vits14")


def test_addresses_of_the_released_heads():
    base = "https://dl.fbaipublicfiles.com/dinov2"
    linear, ms = (
        official_head_url("vitl14", "ade20k", "linear"),
        official_head_url("dinov2_vits14", "voc2012", "linear4"),
    )
    assert linear == f"{base}/dinov2_vitl14/dinov2_vitl14_ade20k_linear_head.pth"
    assert ms == f"{base}/dinov2_vits14/dinov2_vits14_voc2012_ms_head.pth"
    with pytest.raises(UserError, match="vits14, vitb14, vitl14, vitg14"):
        official_head_url("pixels", "ade20k", "linear")
    with pytest.raises(UserError, match=r"'cityscapes'.*ade20k"):
        official_head_url("vits14", "cityscapes", "linear")
    with pytest.raises(UserError, match=r"'linear5'.*Did you mean"):
        official_head_url("vits14", "ade20k", "linear5")
