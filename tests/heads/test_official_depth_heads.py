from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.heads.depth_range import hub_range, published_range, range_notice
from dense_heads.heads.dpt import DPTHead
from dense_heads.heads.linear import LinearHead
from dense_heads.heads.linear_depth import LinearDepthHead
from dense_heads.heads.official import load_head_weights, num_outputs_in, official_head_url
from dense_heads.structures import Features

DEPTH_HEADS = {"linear_depth": "linear", "linear4_depth": "linear4", "dpt": "dpt"}


def make(name: str, width: int = 384, max_m: float = 10.0) -> Head:
    if name == "dpt":
        return DPTHead([width] * 4, min_m=0.001, max_m=max_m)
    return LinearDepthHead([width] * (1 if name == "linear_depth" else 4), max_m=max_m)


def trained(name: str, width: int = 384) -> Head:
    head = make(name, width)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in head.parameters():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return head


def released(path: Path, head: Head, **beside: object) -> Path:
    """A file as mmcv writes it and DINOv2's authors released it."""
    state = OrderedDict((f"decode_head.{key}", value) for key, value in head.state_dict().items())
    torch.save({"meta": {"epoch": 24, "iter": 38_400}, "state_dict": state, **beside}, path)
    return path


def assert_loaded(head: Head, like: Head) -> None:
    assert head.state_dict().keys() == like.state_dict().keys()
    for key, value in like.state_dict().items():
        assert torch.equal(head.state_dict()[key], value), key


@pytest.mark.parametrize("dataset", ["nyu", "kitti"])
@pytest.mark.parametrize("name", DEPTH_HEADS)
def test_released_heads_load_key_for_key(tmp_path, name, dataset):
    source, head = trained(name), make(name)
    path = released(tmp_path / f"dinov2_vits14_{dataset}_{DEPTH_HEADS[name]}_head.pth", source, best=np.float64(0.1))
    load_head_weights(head, path, "dinov2_vits14", dataset)
    assert_loaded(head, source)
    maps = tuple(torch.randn(1, 384, 2, 3) for _ in head.in_channels)
    seen = Features(patch_maps=maps, cls_tokens=tuple(map[:, :, 0, 0] for map in maps), image_size=(28, 42))
    assert torch.equal(head.eval()(seen), source.eval()(seen))
    assert num_outputs_in(path) == 1


def test_an_own_artefact_loads_also_over_registers(tmp_path):
    source, head = trained("dpt", 32), make("dpt", 32)
    safetensors.torch.save_file(source.state_dict(), tmp_path / "head.safetensors")
    load_head_weights(head, tmp_path, "vitn14_reg")
    assert_loaded(head, source)


@pytest.mark.parametrize("name", DEPTH_HEADS)
def test_released_heads_are_refused_over_registers_with_the_reason(tmp_path, name):
    path = released(tmp_path / "head.pth", trained(name))
    with pytest.raises(UserError, match="without registers only; features of the register backbones are others"):
        load_head_weights(make(name), path, "vits14_reg", "nyu")
    with pytest.raises(UserError, match="without registers only"):
        official_head_url("vits14_reg", "nyu", name)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_code_in_a_file_never_runs(tmp_path):
    trap = tmp_path / "trap"
    path = released(tmp_path / "head.pth", trained("linear_depth"), best=Hostile(trap))
    for use in (lambda: load_head_weights(make("linear_depth"), path, "vits14"), lambda: num_outputs_in(path)):
        with pytest.raises(UserError, match="could run code"):
            use()
    assert not trap.exists()
    torch.load(path, weights_only=False)  # the trap itself works
    assert trap.exists()


@pytest.mark.parametrize(
    ("file", "ours", "looks_like"),
    [
        # 3072 channels: four blocks of ViT-S or one of ViT-g, each with its cls token
        (("linear4_depth", 384), ("linear_depth", 384), "head=linear4_depth backbone=vits14 or head=linear_depth back"),
        (("linear_depth", 768), ("linear_depth", 384), "it looks like depth (nyu or kitti), head=linear_depth backb"),
        (("linear4_depth", 1024), ("linear4_depth", 384), "head=linear4_depth backbone=vitl14."),
        (("dpt", 768), ("dpt", 384), "it looks like head=dpt backbone=vitb14."),
        (("dpt", 384), ("linear4_depth", 384), "it looks like head=dpt backbone=vits14."),
        (("linear_depth", 384), ("dpt", 384), "head=linear_depth backbone=vits14."),
        (("linear_depth", 50), ("linear_depth", 384), "it looks like depth (nyu or kitti), 100 channels."),
    ],
)
def test_files_that_do_not_fit_say_whose_they_look_like(tmp_path, file, ours, looks_like):
    path = released(tmp_path / "head.pth", make(*file))
    head = make(*ours)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_head_weights(head, path, "vits14")
    assert looks_like in str(error.value)
    assert all(torch.equal(head.state_dict()[key], value) for key, value in before.items())


def test_files_of_the_other_family_say_so(tmp_path):
    segmentation = tmp_path / "seg.pth"
    state = {f"decode_head.{key}": value for key, value in LinearHead([384], 150).state_dict().items()}
    torch.save({"state_dict": state}, segmentation)
    with pytest.raises(UserError, match=r"does not belong to nyu, which is a depth data set.*ade20k, 150 classes"):
        load_head_weights(make("linear_depth"), segmentation, "vits14", "nyu")
    with pytest.raises(UserError, match=r"does not fit LinearDepthHead.*ade20k, 150 classes, head=linear backbone=vit"):
        load_head_weights(make("linear_depth"), segmentation, "vits14")
    depth = released(tmp_path / "depth.pth", make("linear_depth"))
    with pytest.raises(UserError, match=r"does not belong to voc2012, which has 21 classes.*linear_depth backbone=vi"):
        load_head_weights(LinearHead([384], 21), depth, "vits14", "voc2012")
    assert num_outputs_in(segmentation) == 150


def test_nyu_and_kitti_are_told_apart_by_the_files_name(tmp_path):
    path = released(tmp_path / "dinov2_vits14_kitti_linear_head.pth", trained("linear_depth"))
    with pytest.raises(UserError, match=r"by its name .* on backbone=vits14 for kitti; got .* for nyu"):
        load_head_weights(make("linear_depth"), path, "vits14", "nyu")
    load_head_weights(make("linear_depth"), path, "vits14", "kitti")
    # One block of ViT-g is as wide as four of ViT-S.
    path = released(tmp_path / "dinov2_vits14_nyu_linear4_head.pth", trained("linear4_depth"))
    with pytest.raises(UserError, match="head=linear4_depth on backbone=vits14 for nyu; got a head on 1 block"):
        load_head_weights(make("linear_depth", 1536), path, "vitg14", "nyu")
    with pytest.raises(UserError, match=r"Unknown data set .* 'nyuv2'"):
        load_head_weights(make("linear4_depth"), path, "vits14", "nyuv2")


def test_files_without_a_known_head_have_no_number_of_outputs(tmp_path):
    torch.save({"fc.weight": torch.zeros(3, 3)}, tmp_path / "head.pth")
    with pytest.raises(UserError, match=r"no head that is known here.*got fc\.weight"):
        num_outputs_in(tmp_path / "head.pth")
    safetensors.torch.save_file(DPTHead([32] * 4, 19).state_dict(), tmp_path / "head.safetensors")
    assert num_outputs_in(tmp_path) == 19


def test_addresses_of_the_released_depth_heads():
    base = "https://dl.fbaipublicfiles.com/dinov2"
    for name, theirs in DEPTH_HEADS.items():
        for size in "sbl":
            url = official_head_url(f"vit{size}14", "kitti", name)
            assert url == f"{base}/dinov2_vit{size}14/dinov2_vit{size}14_kitti_{theirs}_head.pth"
    assert official_head_url("dinov2_vitg14", "nyu", "dpt") == f"{base}/dinov2_vitg14/dinov2_vitg14_nyu_dpt_head.pth"
    with pytest.raises(UserError, match=r"official ade20k head 'dpt'.*linear, linear4"):
        official_head_url("vits14", "ade20k", "dpt")
    with pytest.raises(UserError, match=r"official nyu head 'linear'.*linear_depth"):
        official_head_url("vits14", "nyu", "linear")
    with pytest.raises(UserError, match="'sun'"):
        official_head_url("vits14", "sun", "dpt")


@pytest.mark.parametrize("name", DEPTH_HEADS)
def test_ranges_of_the_released_heads(name):
    assert published_range("nyu") == (0.001, 10.0)
    assert published_range("kitti") == (0.001, 80.0)
    assert hub_range("kitti", name) == (0.001, 80.0)
    assert hub_range("nyu", name) == (0.001, 10.0 if name == "dpt" else 80.0)  # facts 2.2
    assert range_notice("kitti", name) is None
    if name == "dpt":
        assert range_notice("nyu", name) is None
    else:
        assert "10 m" in range_notice("nyu", name) and "head.range=hub" in range_notice("nyu", name)


def test_ranges_of_others_are_unknown():
    with pytest.raises(UserError, match="'sun'"):
        published_range("sun")
    with pytest.raises(UserError, match="'linear'"):
        hub_range("nyu", "linear")
