"""Live against transformers and timm, converted both ways, with random weights that leave no tensor unseen."""

import os

import pytest
import torch

from dense_heads.backbones.formats import convert, detect
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.weights import read_weights, save_backbone
from dense_heads.errors import UserError

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

WIDTH, HEADS, DEPTH = 48, 3, 2
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
VARIANTS = [(registers, ffn) for registers in (0, 4) for ffn in ("mlp", "swiglu")]


def randomise(module):
    """Every tensor gets values that change the output if they are lost or swapped."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + 1 if parameter.ndim == 1 and not name.endswith("bias") else noise)
    return module.eval()


def ours(registers, ffn, grid_size):
    options = {"interpolate_antialias": True, "interpolate_offset": 0.0} if registers else {}
    return VisionTransformer(WIDTH, DEPTH, HEADS, registers, ffn, grid_size=grid_size, **options).eval()


def hugging_face(registers, ffn, grid_size, classifier=False):
    options = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "use_swiglu_ffn": ffn == "swiglu",
        "image_size": 14 * grid_size,
        "patch_size": 14,
    }
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        kind = "Dinov2WithRegistersForImageClassification" if classifier else "Dinov2WithRegistersModel"
    else:
        config = transformers.Dinov2Config(**options)
        kind = "Dinov2ForImageClassification" if classifier else "Dinov2Model"
    return randomise(getattr(transformers, kind)(config))


def timm_model(registers, ffn, grid_size, **options):
    size = {"mlp": "small", "swiglu": "giant"}[ffn]
    name = f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2"
    sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "img_size": 14 * grid_size}
    return randomise(timm.create_model(name, **sizes, **({"num_classes": 0} | options)))


@torch.no_grad()
def sequence(vit, images, masks=None):
    out = vit(images, masks)
    return torch.cat((out["cls_token"][:, None], out["register_tokens"], out["patch_tokens"]), dim=1)


def sizes(registers, grid_size):
    """Transformers resizes positions as the original only with registers; else the stored grid alone compares."""
    stored = (14 * grid_size, 14 * grid_size)
    return [stored, (42, 70), (112, 98), (14, 28)] if registers else [stored]


@pytest.mark.parametrize("grid_size", [4, 37])
@pytest.mark.parametrize(("registers", "ffn"), VARIANTS)
@torch.no_grad()
def test_from_transformers(tmp_path, registers, ffn, grid_size):
    theirs = hugging_face(registers, ffn, grid_size)
    theirs.save_pretrained(tmp_path)
    vit = ours(registers, ffn, grid_size)
    vit.load_state_dict(read_weights(tmp_path), strict=True)
    for height, width in sizes(registers, grid_size):
        images = torch.randn(2, 3, height, width)
        torch.testing.assert_close(sequence(vit, images), theirs(images).last_hidden_state, **TOLERANCE)
        masks = torch.rand(2, height * width // 196) < 0.5
        expected = theirs(images, bool_masked_pos=masks).last_hidden_state
        torch.testing.assert_close(sequence(vit, images, masks), expected, **TOLERANCE)
    # In memory transformers uses other names than in its files.
    in_memory = convert(theirs.state_dict())
    assert in_memory.keys() == vit.state_dict().keys()
    assert all(torch.equal(in_memory[key], value) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("grid_size", [5, 37])
@pytest.mark.parametrize(("registers", "ffn"), VARIANTS)
@torch.no_grad()
def test_to_transformers(tmp_path, registers, ffn, grid_size):
    vit = randomise(ours(registers, ffn, grid_size))
    assert save_backbone(vit, tmp_path / "folder", "huggingface") == tmp_path / "folder" / "model.safetensors"
    kind = transformers.Dinov2WithRegistersModel if registers else transformers.Dinov2Model
    theirs, info = kind.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for height, width in sizes(registers, grid_size):
        images = torch.randn(1, 3, height, width)
        torch.testing.assert_close(sequence(vit, images), theirs.eval()(images).last_hidden_state, **TOLERANCE)
    back = convert(convert(vit.state_dict(), "huggingface"), "official")
    assert back.keys() == vit.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in vit.state_dict().items())


@pytest.mark.parametrize("registers", [0, 4])
def test_classification_models_of_transformers_carry_a_prefix_and_a_head(tmp_path, registers):
    theirs = hugging_face(registers, "mlp", 4, classifier=True)
    theirs.save_pretrained(tmp_path)
    vit = ours(registers, "mlp", 4)
    vit.load_state_dict(read_weights(tmp_path), strict=True)
    images = torch.randn(1, 3, 56, 56)
    base = theirs.dinov2_with_registers if registers else theirs.dinov2
    with torch.no_grad():
        torch.testing.assert_close(sequence(vit, images), base(images).last_hidden_state, **TOLERANCE)


@pytest.mark.parametrize("grid_size", [4, 37])
@pytest.mark.parametrize(("registers", "ffn"), VARIANTS)
@torch.no_grad()
def test_from_timm(registers, ffn, grid_size):
    theirs = timm_model(registers, ffn, grid_size, num_classes=7)
    state = theirs.state_dict()
    assert detect(state) == "timm"
    vit = ours(registers, ffn, grid_size)
    vit.load_state_dict(convert(state), strict=True)
    images = torch.randn(2, 3, 14 * grid_size, 14 * grid_size)
    torch.testing.assert_close(sequence(vit, images), theirs.forward_features(images), **TOLERANCE)


@pytest.mark.parametrize("grid_size", [4, 37])
@pytest.mark.parametrize(("registers", "ffn"), VARIANTS)
@torch.no_grad()
def test_to_timm(tmp_path, registers, ffn, grid_size):
    vit = randomise(ours(registers, ffn, grid_size))
    theirs = timm_model(registers, ffn, grid_size)
    with pytest.warns(UserWarning, match="no mask token"):
        file = save_backbone(vit, tmp_path / "timm.safetensors", "timm")
    timm.models.load_checkpoint(theirs, str(file), strict=True)
    images = torch.randn(2, 3, 14 * grid_size, 14 * grid_size)
    torch.testing.assert_close(sequence(vit, images), theirs.forward_features(images), **TOLERANCE)
    again = ours(registers, ffn, grid_size)
    again.load_state_dict(read_weights(file), strict=True)
    other_size = torch.randn(1, 3, 42, 28)
    torch.testing.assert_close(sequence(again, other_size), sequence(vit, other_size), **TOLERANCE)


@pytest.mark.parametrize("registers", [0, 4])
def test_timm_itself_reads_our_official_file(tmp_path, registers):
    # timm converts official files by a code of its own: a second opinion on ours
    vit = randomise(ours(registers, "swiglu", 4))
    save_backbone(vit, tmp_path / "official.pth", "official")
    theirs = timm_model(registers, "swiglu", 4)
    state = torch.load(tmp_path / "official.pth", weights_only=True)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(state, theirs)
    with pytest.warns(UserWarning, match="no mask token"):
        converted = convert(vit.state_dict(), "timm")
    assert filtered.keys() == converted.keys()
    assert all(torch.equal(filtered[key], value) for key, value in converted.items())


def test_conversion_leaves_its_source_alone():
    vit = randomise(ours(4, "swiglu", 4))
    state = {key: value.clone() for key, value in vit.state_dict().items()}
    keys = list(state)
    for target in ("official", "own", "huggingface", "timm"):
        if target == "timm":
            with pytest.warns(UserWarning, match="no mask token"):
                convert(state, target)
        else:
            convert(state, target)
    assert list(state) == keys
    assert all(torch.equal(state[key], value) for key, value in vit.state_dict().items())


def test_unknown_formats_and_foreign_weights_are_named():
    with pytest.raises(UserError, match="Unknown weights format 'onnx'"):
        convert({}, "onnx")
    with pytest.raises(UserError, match=r"not the weights of a DINOv2 backbone.*conv1\.weight"):
        convert({"conv1.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="none"):
        convert({})


def test_incomplete_query_key_value():
    state = convert(ours(0, "mlp", 4).state_dict(), "huggingface")
    name = "encoder.layer.1.attention.attention.{}.weight"
    for part in ("query", "key", "value"):
        broken = {key: value for key, value in state.items() if key != name.format(part)}
        with pytest.raises(UserError, match=r"encoder\.layer\.1.*not complete|not complete.*encoder\.layer\.1"):
            convert(broken)
    with pytest.raises(UserError, match="different shapes"):
        convert(state | {name.format("key"): torch.zeros(3, 5)})
