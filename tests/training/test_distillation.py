"""Distillation through the command: both methods, several students, what is kept of the teacher, mistakes."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import dense_heads
from dense_heads.__main__ import main
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.heads.dino import DINOHead
from dense_heads.losses.distillation import feature_loss
from dense_heads.losses.self_supervised import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from dense_heads.models.dense import FrozenBackbone
from dense_heads.training.backbone import Collapse, Recipe
from dense_heads.training.checkpoints import load_checkpoint
from dense_heads.training.distillation import HeadDistillation
from dense_heads.training.pretraining import Objective
from tests.training.test_pretraining import HEADS, Stub, crops


@pytest.fixture(scope="module")
def tiny_kd(tiny_ssl):
    """The data of the tiny pre-training, and a student that is smaller than its teacher."""
    kept = [o for o in tiny_ssl if not o.startswith(("task=", "backbone", "task.objective", "+task.objective"))]
    student = ["backbone=vitt14_reg", "backbone.weights=null", "teacher=vitn14_reg", "teacher.weights=null"]
    fast = ["optim.lr=2e-3", "optim.warmup=0.1", "task.protocol.momentum=[0.5,0.9]", "optim.patch_embed_lr=1"]
    return ["task=distillation", *kept, *student, *fast, "task.protocol.precision=float32"]


@pytest.fixture(scope="module")
def by_features(tiny_kd, pretrained, tmp_path_factory):
    run = tmp_path_factory.mktemp("features") / "run"
    typed = ["trainer.max_steps=30", "trainer.val_check_interval=30", "task.method=features"]
    formats = "task.formats=[own,official,huggingface]"
    assert main([*tiny_kd, *typed, formats, f"teacher.weights={pretrained}", f"run_dir={run}"]) == 0
    return run


def rows(run):
    return list(csv.DictReader((run / "metrics.csv").open()))


def test_a_student_comes_nearer_to_its_teacher(by_features):
    curve = [row for row in rows(by_features) if row["train/loss"]]
    first, last = curve[0], curve[-1]
    assert float(last["train/loss"]) < 0.7 * float(first["train/loss"])
    for name in ("teacher/patch_cosine", "teacher/cls_cosine"):
        assert float(first[name]) < 0.2 and float(last[name]) > 0.5
    assert float(last["train/loss"]) == pytest.approx(float(last["train/patch"]) + float(last["train/cls"]), rel=1e-4)


def test_the_student_is_kept_in_all_formats_with_a_card_that_names_the_teacher(by_features, pretrained):
    own = dense_heads.load_backbone("vitt14_reg", weights=by_features)
    for file in ("backbone.pth", "huggingface"):
        assert dense_heads.load_backbone("vitt14_reg", weights=by_features / file).fingerprint() == own.fingerprint()
    card = json.loads((by_features / "card.json").read_text())
    teacher = dense_heads.load_backbone("vitn14_reg", weights=pretrained)
    assert card["fingerprint"] == own.fingerprint() and card["method"] == "features"
    assert card["teacher"]["fingerprint"] == teacher.fingerprint() and not card["teacher"]["random"]
    state = load_checkpoint(by_features / "checkpoints" / "step=00000030.ckpt")
    assert state["teacher_fingerprint"] == teacher.fingerprint()
    assert {key.split(".")[0] for key in state["state_dict"]} == {"student", "ema"}  # nothing of the teacher


def test_several_students_learn_on_one_pass_of_the_teacher(tiny_kd, tmp_path, monkeypatch):
    passes = []
    forward = FrozenBackbone.forward
    monkeypatch.setattr(FrozenBackbone, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    run = tmp_path / "run"
    typed = ["students=[vitt14_reg,vitn14_reg]", "task.features.blocks=last4", "trainer.max_steps=4"]
    assert main([*tiny_kd, *typed, "trainer.val_check_interval=4", f"run_dir={run}"]) == 0
    assert len(passes) == 4
    for name in ("vitt14_reg", "vitn14_reg"):
        folder = run / "students" / name
        card = json.loads((folder / "card.json").read_text())
        backbone = dense_heads.load_backbone(name, weights=folder)
        assert (card["backbone"], card["fingerprint"]) == (name, backbone.fingerprint())
        assert "published" in card["reason"] and card["teacher"]["random"]
        assert card["probe"]["knn1_top1"] == float(rows(run)[-1][f"val/{name}/knn1_top1"])
        assert f"train/patch/{name}" in rows(run)[0]
    assert not (run / "backbone.safetensors").exists()


def test_a_run_that_kept_its_heads_teaches_by_them(tiny_kd, pretrained, tmp_path):
    run = tmp_path / "run"
    typed = [f"teacher.weights={pretrained}", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    assert main([*tiny_kd, *typed, f"run_dir={run}"]) == 0
    card = json.loads((run / "card.json").read_text())
    assert card["method"] == "heads" and card["reason"] is None
    assert card["objective"]["heads"]["dino"]["num_prototypes"] == 12
    assert {"train/dino", "train/ibot", "train/koleo", "teacher/entropy"} <= set(rows(run)[0])
    state = load_checkpoint(run / "checkpoints" / "step=00000003.ckpt")["state_dict"]
    assert {".".join(key.split(".")[:2]) for key in state if key.startswith(("ema", "teacher"))} == {"ema.backbone"}


def test_with_heads_nothing_is_hidden_and_all_patches_are_compared():
    """Losses of one batch, put together again from the public pieces (facts sheet 4.3)."""
    small, large = (
        VisionTransformer(width, 2, 2, num_registers=2, grid_size=4, name="vitn14_reg", seed=width)
        for width in (12, 16)
    )
    heads = {name: DINOHead(16, **options, seed=7) for name, options in HEADS.items()}
    objective = Objective(centering="sinkhorn_knopp", mask_probability=1.0, heads=HEADS)
    recipe, teacher = Recipe(10, 0.1, warmup=0.0), FrozenBackbone(large)
    made = HeadDistillation({"": small}, teacher, heads, objective, torch.optim.SGD, recipe, Collapse(), None, 0)
    made.last = made.last._replace(blocks=(1,))  # of a ViT with two blocks
    made.log = made.log_dict = lambda *_, **__: None
    made._trainer = Stub(1, 0)
    batch = crops(4)
    del batch["patch_masks"]
    parts = made.losses(batch)
    wholes, seen = small(batch["crops"][0]), large(batch["crops"][0])
    patches = wholes["patch_tokens"].flatten(0, 1)
    targets = sinkhorn_knopp(heads["ibot"](seen["patch_tokens"].flatten(0, 1)), 0.04)
    masks = torch.ones(8, 9, dtype=torch.bool)
    torch.testing.assert_close(parts["ibot"], ibot_loss(made.student["ibot_head"](patches), targets, masks))
    first, second = sinkhorn_knopp(heads["dino"](seen["cls_token"]), 0.04).chunk(2)
    expected = 2 * dino_loss(made.student["dino_head"](wholes["cls_token"]), torch.cat((second, first)))
    for view in small(batch["crops"][1])["cls_token"].chunk(3):
        expected = expected + sum(dino_loss(made.student["dino_head"](view), t) for t in (first, second))
    torch.testing.assert_close(parts["dino"], expected / 8)
    torch.testing.assert_close(parts["koleo"], 0.1 * sum(map(koleo_loss, wholes["cls_token"].chunk(2))))
    sum(parts.values()).backward()
    assert all(p.grad is None for p in teacher.parameters()) and small.pos_embed.grad is not None


def test_the_distance_of_features_is_zero_at_the_teacher_only():
    target = torch.randn(3, 5, 8)
    aim = (target - target.mean(-1, keepdim=True)) / target.std(-1, keepdim=True, correction=0)
    assert float(feature_loss(aim, target)) == pytest.approx(0, abs=1e-4)
    assert float(feature_loss(2 * aim, target, smooth_l1=0)) == pytest.approx(0, abs=1e-4)
    assert float(feature_loss(2 * aim, target)) > 0.1
    assert float(feature_loss(-aim, target, cosine=1, smooth_l1=0)) == pytest.approx(2, abs=1e-4)


@pytest.mark.slow
def test_a_teacher_of_a_billion_parameters_fits(tiny_ssl, tmp_path):
    """Random weights; memory is measured in a process of its own, all of it included."""
    (root,) = (override for override in tiny_ssl if override.startswith("data.root="))
    typed = ["task=distillation", "backbone=vits14_reg", "backbone.weights=null", "teacher=vitg14_reg", root]
    typed += ["teacher.weights=null", "data.image_size=112", "data.batch_size=2", "data.num_workers=0"]
    typed += ["trainer.max_steps=2", "task.protocol.val_interval=2", "optim.warmup=0", f"run_dir={tmp_path / 'run'}"]
    code = (
        "import resource, sys; from dense_heads.__main__ import main; code = main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    ended = subprocess.run([sys.executable, "-c", code, *typed], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout.split()[-1]) < 6e6  # kB; the weights in float32 alone are 4.5e6
    assert json.loads((tmp_path / "run" / "card.json").read_text())["teacher"]["precision"] in ("streamed", "bfloat16")


@pytest.mark.parametrize("fast", ["false", "true"])
def test_cached_features_of_the_teacher_give_the_bits_of_an_uncached_run(tiny_kd, tmp_path, monkeypatch, fast):
    """7 images in batches of 4, 7 steps: four epochs, so four views are those that an uncached run would see."""
    typed = [*tiny_kd, "teacher.pass_size=1", "task.method=features", f"task.crops.fast={fast}"]
    typed += ["trainer.max_steps=7", "trainer.val_check_interval=7", "task.features.blocks=last4"]
    assert main([*typed, f"run_dir={tmp_path / 'off'}"]) == 0
    expected = load_file(tmp_path / "off" / "backbone.safetensors")
    keeps = ["cache=disk", "cache.dtype=float32", "cache.batch=1", f"cache.dir={tmp_path / 'features'}"]
    assert main([*typed, *keeps, "cache.views=4", f"run_dir={tmp_path / 'cold'}"]) == 0
    monkeypatch.setattr(FrozenBackbone, "forward", None)  # from here on the teacher cannot run
    assert main([*typed, *keeps, "cache.views=4", f"run_dir={tmp_path / 'warm'}"]) == 0
    for run in ("cold", "warm"):
        found = load_file(tmp_path / run / "backbone.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    card = json.loads((tmp_path / "warm" / "card.json").read_text())
    assert card["cache"] == {"kind": "disk", "views": 4, "dtype": "float32"}


def test_one_view_without_chance_is_the_middle_of_each_image(tiny_kd, tmp_path, monkeypatch):
    passes = []
    forward = FrozenBackbone.forward
    monkeypatch.setattr(FrozenBackbone, "forward", lambda *a, **k: passes.append(len(a[1])) or forward(*a, **k))
    typed = [*tiny_kd, "task.method=features", "cache=memory", "cache.views=0", "trainer.max_steps=30"]
    assert main([*typed, "trainer.val_check_interval=30", f"run_dir={tmp_path / 'run'}"]) == 0
    assert sum(passes) == 7  # each image once, whatever the number of steps
    curve = [float(row["train/loss"]) for row in rows(tmp_path / "run") if row["train/loss"]]
    assert curve[-1] < 0.5 * curve[0]


def test_whatever_the_teachers_features_depend_on_makes_another_cache(tiny_kd, tmp_path):
    keeps = ["task.method=features", "cache=disk", f"cache.dir={tmp_path / 'features'}", "trainer.max_steps=1"]
    typed = [*tiny_kd, *keeps, "trainer.val_check_interval=1"]
    changes = [[], ["optim.lr=1e-3"], ["teacher.seed=1"], ["cache.views=2"], ["cache.views=0"], ["seed=1"]]
    changes += [["task.crops.global_scale=[0.5,1]"], ["data.image_size=28"], ["task.features.blocks=last4"]]
    counts = []
    for number, change in enumerate(changes):
        assert main([*typed, "cache.views=1", *change, f"run_dir={tmp_path / str(number)}"]) == 0
        counts.append(len(list((tmp_path / "features").iterdir())))
    assert counts == [1, 1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    "typed, words",
    [
        (["task.method=heads"], "needs a teacher with its heads"),
        (["task.method=logits"], "features"),
        (["students=[vitt14_reg,vitt14_reg]"], "different backbones"),
        (["students=[vitx]"], "Unknown backbone"),
        (["cache=memory"], "cache.views=K"),
        (["cache=memory", "cache.views=-1"], "0 or above"),
        (["task.features={patch: 0, cls: 0}"], "above 0"),
        (["teacher=nobody"], "Unknown teacher"),
        (["~teacher"], "needs a teacher"),
    ],
)
def test_mistakes_end_before_training(tiny_kd, tmp_path, capsys, typed, words):
    kept = [o for o in tiny_kd if not ("teacher" in typed[0] and o.startswith("teacher"))]
    assert main([*kept, *typed, f"run_dir={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()
