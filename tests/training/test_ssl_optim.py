"""Schedules and parameter groups of training a whole ViT."""

import math

import pytest

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.errors import UserError
from dense_heads.heads.dino import DINOHead
from dense_heads.training.backbone import Recipe
from dense_heads.training.ssl_optim import CosineSchedule, WarmupSchedule, parameter_groups


def test_the_cosine_follows_its_formula_after_a_linear_warmup():
    schedule = CosineSchedule(1.0, 0.1, steps=110, warmup=10)
    assert schedule(0) == 0.0 and schedule(9) == 1.0 and schedule(10) == 1.0
    assert schedule(60) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 50 / 100)))
    assert schedule(110) == 0.1 == schedule(1000)
    assert WarmupSchedule(0.04, 0.07, 31)(15) == pytest.approx(0.055)
    assert WarmupSchedule(0.04, 0.07, 31)(31) == 0.07
    with pytest.raises(UserError, match="warmup"):
        CosineSchedule(1.0, 0.1, steps=10, warmup=10)


def test_parameters_decay_and_learn_as_in_the_original():
    vit = VisionTransformer(12, 3, 2, num_registers=1, grid_size=2)
    head = DINOHead(12, 4, 8, 4)
    found = {}
    for group in parameter_groups({"backbone": vit, "dino_head": head}.items(), layer_decay=0.9, patch_embed_lr=0.2):
        for parameter in group["params"]:
            found[id(parameter)] = (group["lr_multiplier"], group["wd_multiplier"], group["last_layer"])
    of = {f"vit.{n}": found[id(p)] for n, p in vit.named_parameters()} | {
        f"head.{n}": found[id(p)] for n, p in head.named_parameters()
    }
    assert len(of) == len(found)
    rate = lambda name: pytest.approx(of[name][0])  # noqa: E731
    for name in ("cls_token", "pos_embed", "register_tokens", "mask_token"):
        assert rate(f"vit.{name}") == 0.9**4 and of[f"vit.{name}"][1] == 1.0
    assert rate("vit.patch_embed.proj.weight") == 0.2 * 0.9**4
    assert rate("vit.blocks.0.attn.qkv.weight") == 0.9**3 and of["vit.blocks.0.attn.qkv.weight"][1] == 1.0
    assert rate("vit.blocks.2.mlp.fc1.bias") == 0.9 and of["vit.blocks.2.mlp.fc1.bias"][1] == 0.0
    assert of["vit.norm.weight"] == (1.0, 0.0, False)
    assert of["vit.blocks.1.ls1.gamma"][1] == of["vit.blocks.1.norm1.weight"][1] == 0.0
    assert of["head.last_layer.weight_v"] == of["head.last_layer.weight_g"] == (1.0, 1.0, True)
    assert of["head.mlp.0.weight"] == (1.0, 1.0, False)


def test_the_last_layer_rests_at_first_whatever_the_length():
    recipe = Recipe(max_steps=200, lr=1.0, freeze_last_layer=0.05)
    assert recipe.last_layer_rests(9) and not recipe.last_layer_rests(10)
