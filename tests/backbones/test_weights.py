"""Loading by name: sources, formats by file, and what broken or hostile files get."""

import json
import os
import pickle
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dense_heads.backbones import weights as weights_module
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.weights import load_backbone, save_backbone
from dense_heads.errors import UserError

NAME = "vitn14_reg"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source():
    return load_backbone(NAME, weights=None, seed=5)


@pytest.fixture
def state(source):
    return {key: value.clone() for key, value in source.state_dict().items()}


@pytest.fixture
def official(tmp_path, source):
    return save_backbone(source, tmp_path / "official.pth", "official")


@pytest.mark.parametrize("form", ["official", "own", "huggingface"])
def test_written_weights_come_back_bit_for_bit(tmp_path, source, form):
    path = tmp_path / {"official": "b.pth", "own": "backbone.safetensors", "huggingface": "folder"}[form]
    file = save_backbone(source, path, form)
    for given in (str(path), file, file.parent if form != "official" else file):
        loaded = load_backbone(f"dinov2_{NAME}", weights=given)
        assert loaded.fingerprint() == source.fingerprint()
        assert not loaded.training
    assert sorted(entry.name for entry in file.parent.iterdir()) == (
        ["config.json", "model.safetensors"] if form == "huggingface" else [path.name]
    )


def test_the_file_tells_its_format_by_content_not_by_name(tmp_path, source):
    save_backbone(source, tmp_path / "own.safetensors")
    os.rename(tmp_path / "own.safetensors", tmp_path / "own.pth")
    assert load_backbone(NAME, weights=tmp_path / "own.pth").fingerprint() == source.fingerprint()


def test_official_training_checkpoint(tmp_path, source, state):
    teacher = {"backbone.pos_embed": torch.randn(1, 1 + 16 * 16, 192), "dino_head.mlp.0.weight": torch.zeros(4, 4)}
    for key, value in state.items():
        parts = key.split(".")
        if parts[0] == "blocks":  # four chunks, global block index inside
            parts.insert(1, str(int(parts[1]) // 2))
        teacher.setdefault("backbone." + ".".join(parts), value)
    teacher["ibot_head.last_layer.weight_g"] = torch.zeros(3)
    torch.save({"teacher": teacher, "iteration": 7}, tmp_path / "teacher_checkpoint.pth")
    loaded = load_backbone(NAME, weights=tmp_path / "teacher_checkpoint.pth")
    assert loaded.grid_size == 16
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, teacher["backbone.pos_embed"] if key == "pos_embed" else state[key])
    # the interpolation starts from the grid of the file
    native = torch.randn(1, 3, 224, 224)
    assert loaded.position(16, 16, torch.float32) is loaded.pos_embed
    assert loaded(native)["patch_tokens"].shape == (1, 256, 192)


def test_half_precision_files_are_computed_in_float32(tmp_path, state):
    torch.save({key: value.half() for key, value in state.items()}, tmp_path / "half.pth")
    loaded = load_backbone(NAME, weights=tmp_path / "half.pth")
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert torch.equal(loaded.norm.weight, state["norm.weight"])


def test_rounded_files_are_half_as_large_and_know_their_fingerprint(tmp_path, source):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    before = source.fingerprint()
    save_backbone(source, whole)
    save_backbone(source, half, dtype=torch.bfloat16)
    assert half.stat().st_size < 0.51 * whole.stat().st_size and source.fingerprint() == before
    loaded = load_backbone(NAME, weights=half)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    with safe_open(half, "pt") as file:
        assert file.metadata()["fingerprint"] == loaded.fingerprint()
    for ours, original in zip(loaded.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, original.bfloat16().float())


def test_loading_does_not_touch_the_global_generator(official):
    before = torch.get_rng_state()
    load_backbone(NAME, weights=official)
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_weights_are_not_tied_to_the_file(tmp_path, source):
    file = save_backbone(source, tmp_path / "own.safetensors")
    loaded = load_backbone(NAME, weights=file)
    with file.open("r+b") as stream:
        stream.truncate(100)
    assert loaded(torch.zeros(1, 3, 28, 28))["cls_token"].isfinite().all()
    assert loaded.fingerprint() == source.fingerprint()


def test_weights_of_another_backbone_say_which(official):
    with pytest.raises(UserError, match=r"does not fit vitt14_reg: missing: blocks\.8\..*looks like vitn14_reg"):
        load_backbone("vitt14_reg", weights=official)
    with pytest.raises(
        UserError,
        match=r"does not fit vits14: missing: blocks\.8\..*; unexpected: register_tokens; other shapes: "
        r"cls_token \(1, 1, 192\) instead of \(1, 1, 384\).*and \d+ more.*looks like vitn14_reg",
    ):
        load_backbone("vits14", weights=official)


def test_weights_of_no_backbone_here(tmp_path):
    other = VisionTransformer(96, 2, 3)
    file = save_backbone(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="none of the backbones here: width 96, 2 blocks, 0 registers, mlp"):
        load_backbone(NAME, weights=file)


def test_missing_unexpected_and_misshaped_tensors_are_named(tmp_path, state):
    del state["blocks.3.ls1.gamma"]
    state["surprise"] = torch.zeros(1)
    state["blocks.0.mlp.fc1.bias"] = torch.zeros(5)
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError) as error:
        load_backbone(NAME, weights=tmp_path / "b.pth")
    for part in ("missing: blocks.3.ls1.gamma", "unexpected: surprise", "fc1.bias (5,) instead of (768,)", "b.pth"):
        assert part in str(error.value)


def test_other_channels(tmp_path, official):
    assert load_backbone(NAME, weights=official, in_channels=4).in_channels == 4  # adapted: see test_channels.py
    four = load_backbone(NAME, weights=None, in_channels=4)
    file = save_backbone(four, tmp_path / "four.safetensors")
    assert load_backbone(NAME, weights=file, in_channels=4).fingerprint() == four.fingerprint()
    with pytest.raises(UserError, match=r"patch_embed.proj.weight .*in_channels"):
        load_backbone(NAME, weights=file, in_channels=5)  # only weights made for colours are adapted


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_are_refused(tmp_path, state, value):
    state["blocks.2.mlp.fc2.weight"][1, 1] = value
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"NaN or infinity in blocks\.2\.mlp\.fc2\.weight"):
        load_backbone(NAME, weights=tmp_path / "b.pth")


@pytest.mark.parametrize("pos_embed", [torch.zeros(1, 1 + 12, 192), torch.zeros(1, 192), torch.zeros(1, 1, 192), None])
def test_a_grid_that_is_not_square_is_refused(tmp_path, state, pos_embed):
    state["pos_embed"] = pos_embed
    if pos_embed is None:
        del state["pos_embed"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"pos_embed.*square grid"):
        load_backbone(NAME, weights=tmp_path / "b.pth")


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_hostile_pickle_runs_nothing(tmp_path, state, legacy):
    payload = state | {"evil": Hostile(f"touch {tmp_path / 'ran'}")}
    if legacy:
        (tmp_path / "b.pth").write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, tmp_path / "b.pth")
    with pytest.raises(UserError, match="refused because such files can run code"):
        load_backbone(NAME, weights=tmp_path / "b.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["official", "own"])
@pytest.mark.parametrize("keep", [0, 5, 2000, 0.5, 0.999])
def test_files_cut_short(tmp_path, source, form, keep):
    file = save_backbone(source, tmp_path / "file", form)
    content = file.read_bytes()
    file.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UserError, match=r"file: .*cut short"):
        load_backbone(NAME, weights=file)


@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"\x00" * 64, b"\xff" * 8 + b"{}", b"x" * 8 + b"{" * 90]
)
def test_files_of_another_kind(tmp_path, content):
    (tmp_path / "b.pth").write_bytes(content)
    with pytest.raises(UserError, match="not readable as"):
        load_backbone(NAME, weights=tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({1: torch.zeros(1)}, "key 1"),
        ({"blocks.0.norm1.weight": "text"}, "Got str under"),
        ({"blocks.0.norm1.weight": torch.zeros(2, dtype=torch.int64)}, "floating-point"),
        ({"blocks.0.norm1.weight": torch.zeros(2).to_sparse()}, "dense tensor"),
        ({"pos_embed": torch.zeros(1).expand(1, 1 + 10**12, 192)}, "fewer numbers"),
        ({"module.blocks.0.a": torch.zeros(1), "blocks.0.a": torch.zeros(1)}, "twice"),
        ({}, "the keys are none"),
        ({"blocks.0.norm1.weight": torch.zeros(2), "cls_token": torch.zeros(())}, "pos_embed"),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "b.pth")
    with pytest.raises(UserError, match=message):
        load_backbone(NAME, weights=tmp_path / "b.pth")


def test_absent_files_and_folders_without_weights(tmp_path):
    with pytest.raises(UserError, match="Got weights 0"):
        load_backbone(NAME, weights=0)
    with pytest.raises(UserError, match=r"no such file.*hf:OWNER/REPOSITORY"):
        load_backbone(NAME, weights=tmp_path / "absent.pth")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"expected backbone.safetensors or model.safetensors, found notes.txt"):
        load_backbone(NAME, weights=tmp_path)


def test_a_hugging_face_config_with_other_heads_is_refused(tmp_path, source):
    folder = tmp_path / "folder"
    save_backbone(source, folder, "huggingface")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 6}))
    with pytest.raises(UserError, match="num_attention_heads 6; vitn14_reg has 3"):
        load_backbone(NAME, weights=folder)


def test_in_house_weights(tmp_path, source, monkeypatch):
    monkeypatch.setattr(weights_module, "IN_HOUSE", tmp_path)
    with pytest.raises(UserError, match=r"no weights of its own for vitn14_reg.*none yet.*weights=None"):
        load_backbone(NAME, weights="in-house")
    save_backbone(source, tmp_path / f"{NAME}.safetensors")
    assert load_backbone(NAME, weights="in-house").fingerprint() == source.fingerprint()
    with pytest.raises(UserError, match=r"it has: vitn14_reg.*weights='official'"):
        load_backbone("vits14", weights="in-house")


def test_the_weights_that_ship_are_small_and_whole():
    file = weights_module.IN_HOUSE / f"{NAME}.safetensors"
    assert file.stat().st_size <= 9_000_000
    with safe_open(file, "pt") as content:
        assert content.metadata()["fingerprint"] == load_backbone(NAME, weights="in-house").fingerprint()


def test_official_weights_of_an_in_house_size():
    with pytest.raises(UserError, match=r"no official weights for vitn14_reg.*vits14"):
        load_backbone(NAME, weights="official")


def test_official_weights_from_torch_hubs_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    small = load_backbone("vits14_reg", weights=None, seed=9)
    folder = tmp_path / "hub" / "checkpoints"
    file = save_backbone(small, folder / "dinov2_vits14_reg4_pretrain.pth", "official")
    assert load_backbone("vits14_reg").fingerprint() == small.fingerprint()
    recorded = json.loads((folder / "dinov2_vits14_reg4_pretrain.pth.json").read_text())
    assert recorded["size"] == file.stat().st_size


def test_hugging_face_repositories(tmp_path, source, monkeypatch):
    save_backbone(source, tmp_path, "huggingface")
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        return str(tmp_path / filename)

    monkeypatch.setattr(weights_module.huggingface_hub, "hf_hub_download", download)
    assert load_backbone(NAME, weights="hf:owner/name").fingerprint() == source.fingerprint()
    assert set(asked) == {("owner/name", "model.safetensors"), ("owner/name", "config.json")}
    with pytest.raises(UserError, match="hf:OWNER/REPOSITORY"):
        load_backbone(NAME, weights="hf:name")

    def refuse(repository, filename):
        raise FileNotFoundError("offline")

    monkeypatch.setattr(weights_module.huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match=r"huggingface.co/owner/name/resolve/main/model.safetensors"):
        load_backbone(NAME, weights="hf:owner/name")


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path, source):
    with pytest.raises(UserError, match="Unknown weights format"):
        save_backbone(source, tmp_path / "x", "onnx")
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="Cannot write"):
        save_backbone(source, tmp_path / "taken", "own")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
    with pytest.raises(UserError, match="no weights that could be written"):
        save_backbone(load_backbone("pixels"), tmp_path / "x")


def test_convert_weights_script(tmp_path, source, official, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "scripts" / "convert_weights.py"), run_name="__main__")
        return end.value.code

    assert run(NAME, "--weights", official, "--to", "huggingface", "--output", tmp_path / "hf") == 0
    assert run(NAME, "--weights", tmp_path / "hf", "--to", "own", "--output", tmp_path / "own.safetensors") == 0
    assert source.fingerprint() in capsys.readouterr().out
    assert load_backbone(NAME, weights=tmp_path / "own.safetensors").fingerprint() == source.fingerprint()
    rounded = tmp_path / "rounded.safetensors"
    assert run(NAME, "--weights", official, "--to", "own", "--output", rounded, "--bfloat16") == 0
    assert load_backbone(NAME, weights=rounded).fingerprint() in capsys.readouterr().out
    assert run("vits14", "--weights", official, "--to", "own", "--output", tmp_path / "x") == 2
    assert "looks like vitn14_reg" in capsys.readouterr().err


def test_safetensors_with_a_foreign_state(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="not the weights of a DINOv2 backbone"):
        load_backbone(NAME, weights=tmp_path / "b.safetensors")
