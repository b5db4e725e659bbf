"""Pre-training through the command: what it writes, how it resumes, what stops it, and two processes as one."""

import csv
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

import dense_heads
from dense_heads.__main__ import main
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.errors import UserError
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.training.backbone import Collapse, Recipe
from dense_heads.training.checkpoints import load_checkpoint
from dense_heads.training.pretraining import CENTERINGS, Objective, PretrainingModule
from tests.training.test_resume import Killed, kill_after, start, tensors

HEADS = {name: {"num_prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8} for name in ("dino", "ibot")}


def test_the_result_is_a_backbone_in_all_formats(pretrained):
    own = dense_heads.load_backbone("vitn14_reg", weights=pretrained)
    for file in ("backbone.pth", "huggingface"):
        other = dense_heads.load_backbone("vitn14_reg", weights=pretrained / file)
        assert other.fingerprint() == own.fingerprint()
    card = json.loads((pretrained / "card.json").read_text())
    assert card["fingerprint"] == own.fingerprint() and card["images"]["number"] == 7 and card["steps"] == 6
    random = dense_heads.load_backbone("vitn14_reg", weights=None)
    assert own.fingerprint() != random.fingerprint()


def test_the_result_is_the_running_mean_of_the_student(pretrained):
    state = load_checkpoint(pretrained / "checkpoints" / "step=00000006.ckpt")["state_dict"]
    kept = load_file(pretrained / "backbone.safetensors")
    for key, tensor in kept.items():
        assert torch.equal(tensor, state[f"ema.backbone.{key}"])
    assert not torch.equal(kept["pos_embed"], state["student.backbone.pos_embed"])


def test_curves_hold_what_a_person_looks_for(pretrained):
    rows = list(csv.DictReader((pretrained / "metrics.csv").open()))
    wanted = {"train/loss", "train/dino", "train/ibot", "train/koleo", "train/features", "teacher/entropy"}
    wanted |= {"teacher/information", "val/knn1_top1", "val/rank", "images_per_s", "lr", "momentum"}
    assert wanted <= set(rows[0])
    last = rows[-1]
    assert float(last["train/loss"]) == pytest.approx(
        sum(float(last[f"train/{name}"]) for name in ("dino", "ibot", "koleo", "features")), rel=1e-4
    )
    assert 0 < float(rows[0]["teacher/entropy"]) <= math.log(12) + 1e-5
    assert float(last["val/knn1_top1"]) == 1.0  # dark and light pictures
    drawn = {file.stem for file in (pretrained / "pictures").glob("*.png")}
    assert drawn >= {"loss", "parts_of_the_loss", "validation", "rank_of_the_features"}


def test_the_small_recipe_trains_from_whitened_patches(tiny_ssl, tmp_path):
    folder = tmp_path / "run"
    recipe = ["dino=0", "ibot=0", "koleo=0", "features=1", "relations=0.5"]
    options = [f"task.objective.{option}" for option in recipe] + ["task.crops.num_local=0", "optim.lr=1e-3"]
    assert main([*tiny_ssl, *options, "task.backbone.start=whitened", f"run_dir={folder}"]) == 0
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert losses[-1] < losses[0] and 0 < float(rows[0]["train/relations"]) < 2
    published = dense_heads.load_backbone("vitn14_reg", weights=None)
    assert dense_heads.load_backbone("vitn14_reg", weights=folder).pos_embed.std() > 5 * published.pos_embed.std()


def test_training_can_go_on_from_weights_and_serve_a_head(pretrained, tiny_ssl, tmp_path):
    again = [*tiny_ssl, f"backbone.weights={pretrained}", "trainer.max_steps=1", "trainer.val_check_interval=1"]
    assert main([*again, "optim.lr=0", "optim.min_lr=0", f"run_dir={tmp_path / 'again'}"]) == 0
    before, after = (load_file(folder / "backbone.safetensors") for folder in (pretrained, tmp_path / "again"))
    for key in before:
        torch.testing.assert_close(before[key], after[key])


def test_a_run_that_broke_off_ends_with_the_same_bits(pretrained, tiny_ssl, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    losses = PretrainingModule.losses

    def killed(module, batch):
        if module.global_step == 5:
            raise Killed
        return losses(module, batch)

    monkeypatch.setattr(PretrainingModule, "losses", killed)
    with pytest.raises(Killed):
        main([*tiny_ssl, "task.objective.features=1", "callbacks.checkpoints.every=2", f"run_dir={broken}"])
    monkeypatch.setattr(PretrainingModule, "losses", losses)
    assert main([f"resume={broken}"]) == 0
    assert_same_bits(pretrained, broken, step=6)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tiny_ssl, tmp_path):
    hard = [*tiny_ssl, "task.objective.features=1", "trainer.max_steps=12", "callbacks.checkpoints.every=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference, process = start([*hard, f"run_dir={whole}"]), start([*hard, f"run_dir={killed}"])
    kill_after(process, killed, step=4)
    assert not (killed / "backbone.safetensors").exists()
    last = start([f"resume={killed}"])
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output
    assert "going on from step" in output
    assert reference.wait(timeout=300) == 0, reference.communicate()[0]
    assert_same_bits(whole, killed, step=12)


def assert_same_bits(whole, stopped, step):
    """Weights, optimiser and curves, but for the speed."""
    states = [load_checkpoint(run / "checkpoints" / f"step={step:08d}.ckpt") for run in (whole, stopped)]
    for key in ("state_dict", "optimizer_states"):
        for one, other in zip(*[list(tensors(state[key])) for state in states], strict=True):
            assert torch.equal(one, other)
    columns = [
        [{k: v for k, v in row.items() if k != "images_per_s"} for row in csv.DictReader((run / "metrics.csv").open())]
        for run in (whole, stopped)
    ]
    assert columns[0] == columns[1]


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.root=nowhere", "nowhere"),
        ("data.image_size=100", "multiple"),
        ("task.objective.centering=none", "sinkhorn_knopp"),
        ("task.crops.blur=strong", "released"),
        ("backbone=pixels", "nothing to train"),
        ("optim.warmup=1", "warmup"),
        ("task.formats=[onnx]", "huggingface"),
        ("task.backbone.start=ones", "whitened"),
        ("task.objective.relations=1", "task.objective.features"),
        ("students=[vitt14_reg]", "task=distillation"),
        ("teacher=vitn14_reg", "task=distillation"),
    ],
)
def test_mistakes_end_before_training(tiny_ssl, tmp_path, capsys, override, words):
    arguments = [a for a in tiny_ssl if not (override == "backbone=pixels" and a.startswith("backbone"))]
    assert main([*arguments, override, f"run_dir={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_with_a_kept_checkpoint(tiny_ssl, tmp_path, capsys, monkeypatch):
    losses = PretrainingModule.losses

    def broken(module, batch):
        return {k: v * (math.nan if module.global_step == 4 else 1) for k, v in losses(module, batch).items()}

    monkeypatch.setattr(PretrainingModule, "losses", broken)
    assert main([*tiny_ssl, "callbacks.checkpoints.every=2", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "not finite at step 4" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "step=00000004.ckpt")["global_step"] == 4


def test_a_collapse_stops_with_a_kept_checkpoint(tiny_ssl, tmp_path, capsys):
    limits = "task.collapse={after: 0.5, min_information: 100, patience: 2}"  # no teacher says as much
    assert main([*tiny_ssl, limits, f"run_dir={tmp_path / 'run'}"]) == 2
    assert "collapsed at step 4" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "step=00000003.ckpt").is_file()


def module(objective, **recipe):
    # LayerScale of 5: a fresh ViT hardly looks at its image, and KoLeo's gradients then magnify what rounding leaves.
    vit = VisionTransformer(12, 2, 2, 2, grid_size=4, interpolate_antialias=True, interpolate_offset=0.0, layer_scale=5)
    made = PretrainingModule(
        {"": vit},
        objective,
        torch.optim.SGD,
        Recipe(10, 0.1, warmup=0.0, **recipe),
        Collapse(),
        NeighbourProbe(),
        seed=0,
    )
    made.log = made.log_dict = lambda *_, **__: None
    return made


def test_every_part_is_weighted_as_in_the_original():
    """Losses of one batch, put together again from the public pieces (facts sheet 4.1)."""
    from dense_heads.losses.self_supervised import dino_loss, ibot_loss, koleo_loss, sinkhorn_knopp

    made = module(Objective(centering="sinkhorn_knopp", heads=HEADS))
    made._trainer = Stub(1, 0)
    batch = crops(4)
    parts = made.losses(batch)
    student, teacher = made.student, made.ema
    wholes = student["backbone"](batch["crops"][0], batch["patch_masks"])
    locals_ = student["backbone"](batch["crops"][1])
    seen = teacher["backbone"](batch["crops"][0])
    target = sinkhorn_knopp(teacher["dino_head"](seen["cls_token"]), 0.04).chunk(2)
    expected = 2 * dino_loss(student["dino_head"](wholes["cls_token"]), torch.cat((target[1], target[0])))
    for view in locals_["cls_token"].chunk(3):
        expected = expected + sum(dino_loss(student["dino_head"](view), t) for t in target)
    torch.testing.assert_close(parts["dino"], expected / (3 * 2 + 2))
    masks = batch["patch_masks"]
    patches = sinkhorn_knopp(teacher["ibot_head"](seen["patch_tokens"][masks]), 0.04)
    torch.testing.assert_close(
        parts["ibot"], ibot_loss(student["ibot_head"](wholes["patch_tokens"][masks]), patches, masks)
    )
    torch.testing.assert_close(parts["koleo"], 0.1 * sum(map(koleo_loss, wholes["cls_token"].chunk(2))))


def crops(num):
    generator = torch.Generator().manual_seed(0)
    wholes = torch.randn(2 * num, 3, 42, 42, generator=generator)
    locals_ = torch.randn(3 * num, 3, 28, 28, generator=generator)
    masks = torch.rand(2 * num, 9, generator=generator) < 0.4
    masks[1] = False
    return {"crops": [wholes, locals_], "patch_masks": masks}


OPTIONS = {"features": 1.0, "koleo_gather": True, "heads": HEADS}


class Stub:
    """What the module asks of a trainer."""

    def __init__(self, world_size, rank):
        self.world_size, self.global_rank, self.global_step = world_size, rank, 0


def _train_shares(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for centering in CENTERINGS:
        torch.save(_trained_share(rank, 2, centering), f"{folder}/{centering}-{rank}")
    torch.distributed.destroy_process_group()


def _trained_share(rank, world_size, centering):
    """Losses, first gradients and last state of 5 steps on this process's share of a batch of 4."""
    made = module(Objective(**OPTIONS, centering=centering), momentum=(0.9, 0.9))
    made._trainer = Stub(world_size, rank)
    whole, share = crops(4), 4 // world_size
    mine = [
        torch.cat([view[rank * share : (rank + 1) * share] for view in group.split(4)])
        for group in (*whole["crops"], whole["patch_masks"])
    ]
    parameters = list(made.student.parameters())
    optimizer, history, gradients = torch.optim.SGD(parameters, lr=0.01), [], []
    for step in range(5):
        made._trainer.global_step = step
        parts = made.losses({"crops": mine[:2], "patch_masks": mine[2]})
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        values = torch.stack([value.detach() for value in parts.values()])
        if world_size > 1:  # what DDP does
            torch.distributed.all_reduce(values)
            values /= world_size
            for parameter in parameters:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world_size
        gradients = gradients or [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        made.update_ema(0.9)
        history.append(values)
    return {"history": torch.stack(history), "gradients": gradients, "state": dict(made.state_dict())}


def test_two_processes_learn_what_one_does(tmp_path):
    spawn(_train_shares, args=(29900 + os.getpid() % 90, str(tmp_path)), nprocs=2)
    for centering in CENTERINGS:
        one = _trained_share(0, 1, centering)
        for rank in (0, 1):
            two = torch.load(tmp_path / f"{centering}-{rank}", weights_only=True)
            torch.testing.assert_close(two["history"], one["history"], rtol=1e-5, atol=1e-6)
            for key, theirs in one["state"].items():
                assert_as_good_as_equal(two["state"][key], theirs, key)
            for ours, theirs in zip(two["gradients"], one["gradients"], strict=True):
                assert_as_good_as_equal(ours, theirs, "gradient")
        begun = module(Objective(**OPTIONS, centering=centering)).state_dict()
        moved = [key for key in begun if not torch.allclose(begun[key], one["state"][key], rtol=1e-3, atol=0)]
        assert len(moved) > 0.9 * len(begun)  # there was something to differ in


def assert_as_good_as_equal(ours, theirs, name):
    """Each entry to 1e-5 of the tensor's largest: entries whose true value is nearly zero hold nothing but rounding."""
    scale = float(theirs.float().abs().max())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * scale, msg=lambda text: f"{name}: {text}")


def test_a_run_of_unequal_weights_is_refused():
    with pytest.raises(UserError, match="above 0"):
        Objective(dino=0, ibot=0, features=0)
