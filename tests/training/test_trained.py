"""A backbone that learns with its head: through the command, kept, resumed, used again; mistakes."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dense_heads
from dense_heads.__main__ import main
from dense_heads.backbones.weights import load_backbone
from dense_heads.training.checkpoints import load_checkpoint
from tests.factories import fake_pair, make_depth_folders

LEARNS = ["backbone.trainable=true", "optim.backbone_lr=1e-3"]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    assert main([*tiny, *LEARNS, f"run_dir={run}"]) == 0
    return run


def test_the_backbone_has_changed_and_is_kept_beside_the_head(trained):
    before, after = load_backbone("vitn14_reg", None), load_backbone("vitn14_reg", trained)
    moved = {key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert moved == set(before.state_dict()) - {"mask_token"}
    card, found = (json.loads((trained / name).read_text()) for name in ("card.json", "metrics.json"))
    assert card["backbone"]["weights"] == "backbone.safetensors"
    assert card["backbone"]["fingerprint"] == after.fingerprint() == found["backbone"]["fingerprint"]
    assert found["backbone"]["trained"] and any("trained with the head" in note for note in found["notes"])
    state = load_checkpoint(trained / "checkpoints" / "step=00000006.ckpt")
    assert state["backbone_fingerprint"] == before.fingerprint()
    assert torch.equal(state["state_dict"]["backbone.backbone.cls_token"], after.cls_token)
    heads, backbone = state["optimizer_states"][0]["param_groups"]
    assert (heads["initial_lr"], backbone["initial_lr"]) == (1e-2, 1e-3)


def test_a_run_with_its_own_backbone_is_measured_moved_and_used(trained, tmp_path):
    before = json.loads((trained / "metrics.json").read_text())["metrics"]
    assert main(["mode=evaluate", f"model={trained}"]) == 0
    (folder,) = (trained / "evaluate").iterdir()
    found = json.loads((folder / "metrics.json").read_text())
    assert found["metrics"] == pytest.approx(before, abs=1e-6)
    assert (
        not any("random" in note for note in found["notes"])
        and "learnt nothing" not in (folder / "report.html").read_text()
    )
    image, _ = fake_pair(5)
    expected = dense_heads.load_model(trained).predict(image)
    moved = trained.rename(tmp_path / "elsewhere")
    try:
        assert np.array_equal(dense_heads.load_model(moved).predict(image), expected)
    finally:
        moved.rename(trained)


def test_a_resumed_run_ends_with_the_same_bits(tiny, trained, tmp_path):
    run = tmp_path / "run"
    shorter = [*tiny, *LEARNS, "callbacks.checkpoints.every=2", f"run_dir={run}"]
    assert main(shorter) == 0
    for path in ("step=00000006.ckpt", "best.safetensors"):
        (run / "checkpoints" / path).unlink()
    assert main([f"resume={run}"]) == 0
    for name in ("backbone.safetensors", "head.safetensors"):
        ours, theirs = load_file(run / name), load_file(trained / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_best_step_brings_its_backbone_along(tmp_path):
    data = make_depth_folders(tmp_path / "data")
    typed = [
        "task=depth", f"data.root={data}", "backbone=vitn14_reg", "backbone.weights=null", "head=linear_depth",
        "data.image_size=[42,56]", "data.batch_size=2", "data.num_workers=0", "trainer.max_steps=4",
        "trainer.val_check_interval=1", "trainer.accelerator=cpu", "task.protocol.select=best", *LEARNS,
        "optim.lr=1e-2", "+task.data.format.splits={train:training,val:validation}",
    ]  # fmt: skip
    run = tmp_path / "run"
    assert main([*typed, f"run_dir={run}"]) == 0
    best = load_file(run / "checkpoints" / "best.safetensors")
    kept = load_file(run / "backbone.safetensors")
    assert all(torch.equal(best[f"backbone.backbone.{key}"], value) for key, value in kept.items())
    assert all(torch.equal(best[f"0.{key}"], value) for key, value in load_file(run / "head.safetensors").items())


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["cache=memory", "cache.views=0"], "cache=off"),
        (["head=grid"], "several heads"),
        (["head=prototype"], "without training"),
        (["backbone.precision=bfloat16"], "bf16-mixed"),
        (["backbone=pixels", "backbone.precision=float32"], "nothing to train"),
        (["task=classification"], "only the head is trained"),
    ],
)
def test_mistakes(tiny, tmp_path, capsys, typed, words):
    kept = [o for o in tiny if "task=classification" not in typed or not o.startswith(("task", "+task", "data.image"))]
    kept = [o for o in kept if "backbone=pixels" not in typed or not o.startswith("backbone")]
    assert main([*kept, *LEARNS, *typed, f"run_dir={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err
