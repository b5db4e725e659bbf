"""Names, sizes and block sets; and the options of the configuration that stand for them."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dense_heads.backbones.weights import IN_HOUSE, load_backbone
from dense_heads.backbones.zoo import BACKBONES, get_spec, resolve_blocks
from dense_heads.build.heads import HOW_IT_RUNS
from dense_heads.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "backbone"


def test_the_zoo_can_be_read_without_torch():
    code = "import sys, dense_heads.backbones.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "even4"),
    [
        ("vits14", (2, 5, 8, 11)),
        ("vitb14_reg", (2, 5, 8, 11)),
        ("vitl14_reg", (4, 11, 17, 23)),
        ("vitl14", (4, 11, 17, 23)),
        ("vitg14", (9, 19, 29, 39)),
        ("vitn14_reg", (1, 3, 5, 7)),
        ("vitt14_reg", (2, 5, 8, 11)),
        ("vitp14_reg", (0, 2, 3, 5)),
    ],
)
def test_block_sets(name, even4):
    depth = get_spec(name).num_blocks
    assert resolve_blocks(name, "even4") == even4
    assert resolve_blocks(get_spec(name), "last4") == tuple(range(depth - 4, depth))
    assert resolve_blocks(f"dinov2_{name}", "last") == (depth - 1,)
    assert resolve_blocks(name, "quarters") == (even4 if depth != 24 else (5, 11, 17, 23))


def test_official_addresses():
    base = "https://dl.fbaipublicfiles.com/dinov2"
    assert get_spec("dinov2_vits14").official_url == f"{base}/dinov2_vits14/dinov2_vits14_pretrain.pth"
    assert get_spec("vitg14_reg").official_url == f"{base}/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth"


def test_unknown_names_list_what_there_is():
    with pytest.raises(UserError, match=r"Unknown backbone 'vitl14_regs'. Did you mean 'vitl14_reg'\?.*vits14"):
        get_spec("vitl14_regs")
    with pytest.raises(UserError, match="last, last4"):
        resolve_blocks("vits14", "first")


def test_every_backbone_has_an_option_and_every_key_is_an_argument():
    options = {path.stem: yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")}
    base = options.pop("_base")
    assert set(options) == set(BACKBONES)
    for name, own in options.items():
        assert own.pop("defaults") == ["_base", "_self_"]
        option = {key: value for key, value in {**base, **own}.items() if key not in HOW_IT_RUNS}
        assert option.pop("_target_") == "dense_heads.backbones.weights.load_backbone"
        bound = inspect.signature(load_backbone).bind(**option).arguments
        assert bound["name"] == name
        in_house = "in-house" if (IN_HOUSE / f"{name}.safetensors").is_file() else None
        assert bound["weights"] == ("official" if BACKBONES[name].official else in_house)
