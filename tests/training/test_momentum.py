"""The published depth recipe's momentum through the command: what the optimiser had, and that resume keeps it."""

import csv
import math

import pytest
import torch
from safetensors.torch import load_file

from dense_heads.__main__ import main
from dense_heads.training.checkpoints import load_checkpoint
from tests.factories import make_depth_folders

STEPS = 10
TYPED = [
    "task=depth", "head=linear_depth", "backbone=vitn14_reg", "backbone.weights=null", "trainer.accelerator=cpu",
    "data.batch_size=2", "data.num_workers=0", "data.image_size=[28,28]", "callbacks.pictures.num=1",
    f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", "trainer.log_every_n_steps=1",
    "callbacks.checkpoints.every=4", "task.protocol.momentum=one_cycle", "task.protocol.end=0.2",
    "task.protocol.warmup_steps=3",
]  # fmt: skip


def beta(step):
    """By hand: the cosine's turn is at 0.3 x 10 - 1 = 2, its end at 9."""
    if step <= 2:
        return 0.85 + 0.05 * (1 + math.cos(math.pi * step / 2))
    return 0.95 - 0.05 * (1 + math.cos(math.pi * (step - 2) / 7))


def test_a_run_has_the_momentum_of_each_step_and_resume_ends_with_the_same_bits(tmp_path):
    data = make_depth_folders(tmp_path / "data")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        assert main([*TYPED, f"data.root={data}", f"run_dir={run}"]) == 0
    assert len(list((cut / "checkpoints").glob("step=*.ckpt"))) == 2
    for step in (8, STEPS):
        state = load_checkpoint(whole / "checkpoints" / f"step={step:08d}.ckpt")
        (group,) = state["optimizer_states"][0]["param_groups"]
        assert tuple(group["betas"]) == (pytest.approx(beta(step - 1), rel=1e-12), 0.999)
    rates = [float(row["lr"]) for row in csv.DictReader((whole / "metrics.csv").open())]
    falls = [0.8 * (1 + math.cos(math.pi * step / STEPS)) / 2 + 0.2 for step in range(STEPS)]
    warm = [1 - (1 - step / 3) * (1 - 1e-3) if step < 3 else 1 for step in range(STEPS)]
    assert rates == pytest.approx([1e-4 * f * w for f, w in zip(falls, warm, strict=True)], rel=1e-5)

    (cut / "checkpoints" / f"step={STEPS:08d}.ckpt").unlink()
    assert main([f"resume={cut}"]) == 0
    ours, theirs = load_file(cut / "head.safetensors"), load_file(whole / "head.safetensors")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (cut / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_the_first_step_already_has_it(tmp_path):
    """After one step Adam's averages are (1 - beta1) g and (1 - beta2) g^2, whatever the gradient g was."""
    data, run = make_depth_folders(tmp_path / "data"), tmp_path / "run"
    own = ["trainer.max_steps=1", "trainer.val_check_interval=1", f"data.root={data}", f"run_dir={run}"]
    assert main([*TYPED, *own]) == 0
    states = load_checkpoint(run / "checkpoints" / "step=00000001.ckpt")["optimizer_states"][0]["state"].values()
    for state in states:
        moved = state["exp_avg_sq"] > 0
        ratio = state["exp_avg"][moved].double() ** 2 / state["exp_avg_sq"][moved].double()
        assert moved.any() and ratio.median().item() == pytest.approx(0.05**2 / 0.001, rel=1e-3)
