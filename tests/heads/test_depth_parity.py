"""The depth heads against the recorded outputs of the original code, and the key lists of the released files."""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dense_heads.backbones.weights import load_backbone
from dense_heads.backbones.zoo import resolve_blocks
from dense_heads.heads.dpt import DPTHead
from dense_heads.heads.linear_depth import LinearDepthHead
from dense_heads.models.dense import FrozenBackbone

PARITY = Path(__file__).parents[2] / "../shared/parity"
CASES = sorted(path.stem for path in PARITY.glob("depth-dinov2_*.safetensors"))
# Where DPT's last relu is all but shut, 1 mm is what is left of logits near 1: there the original itself is 1e-3 from
# the same sums in float64, and only an absolute bound says anything.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

pytestmark = pytest.mark.skipif(not PARITY.is_dir(), reason="parity vectors are not beside the repository")


@cache
def seeded():
    spec = importlib.util.spec_from_file_location("parity_seeded", PARITY / "seeded.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["parity_seeded"] = module
    spec.loader.exec_module(module)
    return module


def make_head(kind, width, min_m, max_m):
    """`kind`: dd (DPT), ld1 or ld4 (linear on one or four blocks), as the original's entries end."""
    if kind == "dd":
        return DPTHead([width] * 4, min_m=min_m, max_m=max_m)
    if kind == "ld1":
        return LinearDepthHead([width], min_m=min_m, max_m=max_m)
    return LinearDepthHead([width] * 4, blocks="even4", min_m=min_m, max_m=max_m)


@pytest.mark.parametrize("case", CASES)
def test_depth_equals_the_original(case):
    with safe_open(PARITY / f"{case}.safetensors", "pt") as file:
        metadata = file.metadata()
        expected = {key: file.get_tensor(key) for key in file.keys()}
    kind = metadata["entry"].rsplit("_", 1)[1] + metadata["layers"]
    variant = metadata["entry"].split("_")[1]
    backbone = load_backbone(variant, weights=None)
    shapes = {f"backbone.{key}": value.shape for key, value in backbone.state_dict().items()}
    state = seeded().seeded_state(shapes)
    backbone.load_state_dict({key.removeprefix("backbone."): value for key, value in state.items()}, strict=True)

    head = make_head(kind, 384, float(metadata["head_min_depth"]), float(metadata["head_max_depth"])).eval()
    shapes = {f"decode_head.{key}": value.shape for key, value in head.state_dict().items()}
    state = seeded().seeded_state(shapes)
    head.load_state_dict({key.removeprefix("decode_head."): value for key, value in state.items()}, strict=True)
    if "override" in metadata:
        assert metadata["override"].startswith("2.0 is added to the seeded decode_head.conv_depth.head.4.bias")
        with torch.no_grad():
            head.conv_depth.head[4].bias += 2.0

    height, width = expected["depth"].shape[-2:]
    images = seeded().seeded_image(metadata["image_key"], (2, 3, height, width))
    frozen = FrozenBackbone(backbone)
    features = frozen(images, [frozen.request(head)]).features(frozen.request(head))
    assert frozen.request(head).blocks == resolve_blocks(variant, "last" if kind == "ld1" else "even4")
    with torch.no_grad():
        depth = frozen.predict_all(images, [head])[0]
        # The recorded head output is from before the clamp, as DPT's is in training.
        unclamped = head.train()(features)
    torch.testing.assert_close(unclamped, expected["head_output"], **CLOSE)
    torch.testing.assert_close(depth, expected["depth"], **CLOSE)


def test_every_kind_of_head_is_compared():
    kinds = [case.split("-")[1].rsplit("_", 1)[1] for case in CASES]
    assert set(kinds) == {"dd", "ld1", "ld4"}
    assert any("x201" in case for case in CASES)  # an odd grid, padded


@pytest.mark.parametrize("kind", ["dd", "ld1", "ld4"])
def test_state_dicts_are_the_released_ones(kind):
    shapes = json.loads((PARITY / "depth-head-state-dict-shapes.json").read_text())[f"dinov2_vits14_{kind}"]
    head = make_head(kind, 384, 0.001, 10.0)
    ours = {f"decode_head.{key}": list(value.shape) for key, value in head.state_dict().items()}
    assert ours == shapes
