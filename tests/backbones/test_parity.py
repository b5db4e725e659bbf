"""Against the recorded outputs of the original code, and against the key lists of the released files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dense_heads.backbones.weights import load_backbone
from dense_heads.backbones.zoo import BACKBONES

PARITY = Path(__file__).parents[2] / "../shared/parity"
CASES = sorted(path.stem for path in PARITY.glob("backbone-*.safetensors"))
TOLERANCE = 2e-4

pytestmark = pytest.mark.skipif(not PARITY.is_dir(), reason="parity vectors are not beside the repository")


def _seeded():
    spec = importlib.util.spec_from_file_location("parity_seeded", PARITY / "seeded.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_seeded"] = module
    spec.loader.exec_module(module)
    return module


def _params(case):
    heavy = "vitg14" in case or "vitl14" in case or "518x518" in case
    return pytest.param(case, marks=pytest.mark.slow if heavy else ())


@pytest.mark.parametrize("case", [_params(case) for case in CASES])
def test_backbone_equals_the_original(case):
    seeded = _seeded()
    with safe_open(PARITY / f"{case}.safetensors", "pt") as file:
        metadata = file.metadata()
        expected = {key: file.get_tensor(key) for key in file.keys()}
    backbone = load_backbone(metadata["variant"], weights=None)
    state = seeded.seeded_state({key: value.shape for key, value in backbone.state_dict().items()})
    backbone.load_state_dict(state, strict=True)
    height, width = map(int, metadata["size"].split("x"))
    images = seeded.seeded_image(metadata["image_key"], (2, 3, height, width))
    layers = json.loads(metadata["layers"])

    got = {}
    with torch.no_grad():
        out = backbone(images)
        masked = backbone(images, masks=expected["mask"].bool())
        got["x_norm_clstoken"], got["masked.x_norm_clstoken"] = out["cls_token"], masked["cls_token"]
        got["x_norm_regtokens"], got["masked.x_norm_regtokens"] = out["register_tokens"], masked["register_tokens"]
        got["x_norm_patchtokens"] = out["patch_tokens"][:, ::7]
        got["masked.x_norm_patchtokens"] = masked["patch_tokens"][:, ::7]
        for norm in (0, 1):
            pairs = backbone.get_intermediate_layers(images, layers, True, True, norm=bool(norm))
            for layer, (patches, cls) in zip(layers, pairs, strict=True):
                prefix = f"layer{layer}.norm{norm}"
                got[f"{prefix}.cls"] = cls
                got[f"{prefix}.patch_mean_hw"] = patches.mean((2, 3))
                got[f"{prefix}.patch_corner"] = patches[:, :, -1, -1]
    compared = 0
    for key, value in expected.items():
        if key == "mask":
            continue
        assert key in got, key
        torch.testing.assert_close(got[key], value, atol=TOLERANCE, rtol=0, msg=lambda m, key=key: f"{key}: {m}")
        compared += 1
    assert compared >= 3 + 6 * len(layers)


@pytest.mark.parametrize("name", [name for name, spec in BACKBONES.items() if spec.official])
def test_state_dict_has_the_official_keys_and_shapes(name):
    expected = json.loads((PARITY / "backbone-state-dict-shapes.json").read_text())[name]
    with torch.device("meta"):
        state = load_backbone(name, weights=None).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == expected
    assert list(state) == list(expected)  # and in the official order
