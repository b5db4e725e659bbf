"""A trained model teaches a student: the losses by hand, and the command from the teacher's run to the report."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import dense_heads
from dense_heads.__main__ import main
from dense_heads.losses.depth import DepthLoss
from dense_heads.losses.distillation import feature_loss, soft_divergence
from dense_heads.training.checkpoints import load_checkpoint
from dense_heads.training.task_distillation import Taught
from tests.factories import fake_pair, make_camvid, make_depth_folders, save

STUDENT = ["backbone=vitt14_reg", "backbone.weights=null", "backbone.precision=float32"]
LEARNS = ["backbone.trainable=true", "optim.backbone_lr=1e-3"]


def read(run, name="metrics.json"):
    return json.loads((run / name).read_text())


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """A model whose backbone was trained too, and whose head is of another kind than the student's."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    typed = [*tiny, *LEARNS, "head=linear", "trainer.max_steps=12", "trainer.val_check_interval=12"]
    assert main([*typed, f"run_dir={run}"]) == 0
    return run


@pytest.fixture(scope="module")
def student(tiny, teacher, unlabelled):
    kept = [override for override in tiny if not override.startswith("backbone")]
    return [*kept, *STUDENT, *LEARNS, f"distill={teacher}", f"data.unlabeled={unlabelled}", "task.distill.features=0.5"]


@pytest.fixture(scope="module")
def taught(student, tmp_path_factory):
    run = tmp_path_factory.mktemp("taught") / "run"
    assert main([*student, f"run_dir={run}"]) == 0
    return run


# The losses


def test_the_divergence_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 3, (2, 2, 4, 3, 5))
    for temperature in (1.0, 2.5):
        p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True) for x in (theirs, ours))
        expected = temperature**2 * (p * np.log(p / q)).sum(1)
        found = soft_divergence(torch.from_numpy(ours), torch.from_numpy(theirs), temperature)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert float(soft_divergence(torch.from_numpy(ours), torch.from_numpy(ours) + 7, 2.0).abs().max()) < 1e-5


class Seen(Exception):
    """The first step is done."""


def parts_of_a_step(monkeypatch, typed, run):
    """What the first step of a run saw, what came out of it, and its module."""
    seen = {}
    original = Taught.losses

    def losses(self, batch):
        logged = {}
        monkeypatch.setattr(self, "log_dict", lambda values, **_: logged.update(values), raising=False)
        found = original(self, batch)
        seen.setdefault("first", (self, batch, {key: float(v) for key, v in logged.items()}, float(found[0].detach())))
        raise Seen

    monkeypatch.setattr(Taught, "losses", losses)
    with pytest.raises(Seen):
        main([*typed, f"run_dir={run}"])
    monkeypatch.undo()
    return seen["first"]


def test_the_loss_of_a_segmentation_step_is_put_together_from_public_pieces(student, teacher, tmp_path, monkeypatch):
    typed = [*student, "data.image_size=56", "task.distill.temperature=3", "task.distill.labels=0.7"]
    module, batch, logged, total = parts_of_a_step(monkeypatch, typed, tmp_path / "run")
    images, mask = batch["image"], batch["mask"]
    small, large = module.backbone.backbone, dense_heads.load_model(teacher)
    assert {int((m != 255).any()) for m in mask} == {0, 1}  # images of both kinds in this batch
    with torch.no_grad():
        seen = small.get_intermediate_layers(images, n=4, reshape=True, return_class_token=True, norm=True)
        x = torch.cat([maps for maps, _ in seen], 1)
        head = module.heads[0]
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        logits = torch.nn.functional.interpolate(head.conv_seg(x), images.shape[-2:], mode="bilinear")
        aim = large(images)
        p, q = torch.softmax(aim / 3, 1), torch.log_softmax(logits / 3, 1)
        pixels = (images != 0).any(1)
        divergence = 9 * (p * (p.log() - q)).sum(1)[pixels].mean()
        entropy = torch.nn.functional.cross_entropy(logits, mask, ignore_index=255, reduction="sum") / mask.numel()
        ((maps, token),) = large.backbone.backbone.get_intermediate_layers(
            images, reshape=True, return_class_token=True, norm=True
        )
        patch, cls = module.projector(seen[-1][0].flatten(2).mT, seen[-1][1])
        features = feature_loss(patch, maps.flatten(2).mT) + feature_loss(cls, token)
    assert logged["train/teacher"] == pytest.approx(float(divergence), rel=1e-4)
    assert logged["train/labels"] == pytest.approx(0.7 * float(entropy), rel=1e-4)
    assert logged["train/features"] == pytest.approx(0.5 * float(features), rel=1e-4)
    assert total == pytest.approx(sum(logged.values()), rel=1e-5)


# The command


def test_the_report_holds_teacher_student_and_the_student_alone(tiny, taught, teacher, tmp_path):
    found = read(taught)["distillation"]
    scores = read(taught)["metrics"], found["teacher"]["metrics"], found["alone"]["metrics"]
    ours, theirs, alone = (metrics["val/miou"] for metrics in scores)
    assert theirs == pytest.approx(read(teacher)["metrics"]["val/miou"], abs=1e-6)
    assert found["retention"] == pytest.approx(ours / theirs)
    assert found["alone"]["retention"] == pytest.approx(alone / theirs)
    kept = [override for override in tiny if not override.startswith("backbone")]
    assert main([*kept, *STUDENT, *LEARNS, f"run_dir={tmp_path / 'alone'}"]) == 0
    assert read(tmp_path / "alone")["metrics"] == pytest.approx(found["alone"]["metrics"])
    page = (taught / "report.html").read_text()
    assert f"{100 * found['retention']:.1f} %" in page and "without the teacher" in page
    gap, side = 100 * abs(ours - alone), "above" if ours >= alone else "below"
    assert "Retention" in page and f"This run is {gap:.1f} points {side} that student." in page
    assert any("5 images without labels" in note for note in read(taught)["notes"])
    assert (taught / "alone" / "metrics.csv").is_file() and not (taught / "alone" / "checkpoints").exists()


def test_the_student_is_a_run_like_any_other(taught, tmp_path):
    card = read(taught, "card.json")
    backbone = dense_heads.load_backbone("vitt14_reg", weights=taught)
    assert card["backbone"]["fingerprint"] == backbone.fingerprint()
    assert main(["mode=evaluate", f"model={taught}"]) == 0
    (folder,) = (taught / "evaluate").iterdir()
    assert read(folder)["metrics"] == pytest.approx(read(taught)["metrics"], abs=1e-6)
    image = save(tmp_path / "image.png", fake_pair(9)[0])
    assert main(["mode=predict", f"model={taught}", f"input={image}", f"output={tmp_path / 'out'}"]) == 0
    assert (tmp_path / "out" / "labels" / "image.png").is_file()
    keys = load_checkpoint(taught / "checkpoints" / "step=00000006.ckpt")["state_dict"]
    assert {key.split(".")[0] for key in keys} == {"backbone", "heads", "projector"}  # nothing of the teacher


def test_a_resumed_student_ends_with_the_same_bits(student, taught, tmp_path):
    run = tmp_path / "run"
    assert main([*student, "callbacks.checkpoints.every=2", "task.distill.alone=false", f"run_dir={run}"]) == 0
    assert read(run)["distillation"]["alone"] is None
    (run / "checkpoints" / "step=00000006.ckpt").unlink()
    assert main([f"resume={run}"]) == 0
    for name in ("backbone.safetensors", "head.safetensors"):
        ours, theirs = load_file(run / name), load_file(taught / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_teacher_pulls_a_frozen_student_towards_itself(tiny, teacher, unlabelled, tmp_path):
    """By the teacher alone, all heads of a grid on one pass of it."""
    typed = [*tiny, f"distill={teacher}", "task.distill.labels=0", "task.distill.alone=false", "head=grid"]
    grid = ["head.heads=[linear,linear4]", "head.lr=[1e-2]", "trainer.max_steps=30", "trainer.val_check_interval=30"]
    run = tmp_path / "run"
    assert main([*typed, *grid, f"run_dir={run}"]) == 0
    model, aim = dense_heads.load_model(run), dense_heads.load_model(teacher)
    agree = [np.mean(model.predict(fake_pair(s)[0]) == aim.predict(fake_pair(s)[0])) for s in range(3)]
    assert min(agree) > 0.8


def depth_run(data):
    return [
        "task=depth", f"data.root={data}", "backbone=vitn14_reg", "backbone.weights=null", "head=linear_depth",
        "backbone.precision=float32", "data.image_size=[42,56]", "data.batch_size=4", "data.num_workers=0",
        "trainer.max_steps=8", "trainer.val_check_interval=4", "trainer.accelerator=cpu", "optim.lr=1e-2",
        "+task.data.format.splits={train:training,val:validation}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def depth(tmp_path_factory):
    root = tmp_path_factory.mktemp("depth")
    typed = depth_run(make_depth_folders(root / "data"))
    assert main([*typed, *LEARNS, f"run_dir={root / 'teacher'}"]) == 0
    return typed, root / "teacher"


def test_depth_is_taught_by_the_tasks_own_loss(depth, unlabelled, tmp_path, monkeypatch):
    typed, run = depth
    taught = [*typed, f"distill={run}", f"data.unlabeled={unlabelled}"]
    module, batch, logged, _ = parts_of_a_step(monkeypatch, taught, tmp_path / "step")
    with torch.no_grad():
        aim = dense_heads.load_model(run)(batch["image"])
        aim[~(batch["image"] != 0).any(1)] = 0
        head = module.heads[0]
        levels = module.backbone(batch["image"], module.requests)
        metres = module.backbone.placement(levels).enlarge(head(levels.features(module.requests[0])))[:, 0]
        for name, target in (("teacher", aim), ("labels", batch["depth_m"])):
            assert logged[f"train/{name}"] == pytest.approx(float(DepthLoss()(metres, target)), rel=1e-4), name
    assert main([*taught, f"run_dir={tmp_path / 'run'}"]) == 0
    found = read(tmp_path / "run")
    theirs = found["distillation"]["teacher"]["metrics"]["val/abs_rel"]
    assert found["distillation"]["retention"] == pytest.approx(theirs / found["metrics"]["val/abs_rel"])
    assert found["distillation"]["alone"]["retention"] > 0


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["distill=nowhere"], "no such run"),
        (["distill={camvid}"], "same classes"),
        (["distill={depth}"], "model of depth"),
        (["distill={empty}"], "holds no trained head"),
        (["distill=null"], "nobody labels"),
        (["data.unlabeled=nowhere"], "no such folder"),
        (["data.unlabeled={own}"], "belong to"),
        (["task.distill.temperature=0"], "temperature"),
        (["task.distill.teacher=-1"], "0 or above"),
        (["task.distill.teacher=0", "task.distill.features=0"], "teaches nothing"),
        (["backbone.trainable=false"], "frozen student"),
        (["backbone.trainable=false", "task.distill.features=0", "cache=memory", "cache.views=0"], "cache=off"),
        (["backbone.trainable=false", "task.distill.features=0", "head=prototype"], "without training"),
        (["task=nuclei_instance"], "learns from labels alone"),
    ],
)
def test_mistakes(student, depth, pairs, tmp_path, tmp_path_factory, capsys, typed, words):
    places = {"depth": depth[1], "empty": tmp_path, "own": pairs / "images", "camvid": tmp_path / "camvid"}
    if "{camvid}" in typed[0]:
        data = make_camvid(tmp_path / "data")
        other = ["task=camvid", f"data.root={data}", *STUDENT, "debug=fast", "trainer.accelerator=cpu"]
        assert main([*other, "data.image_size=56", "data.batch_size=2", f"run_dir={places['camvid']}"]) == 0
    typed = [override.format(**places) for override in typed]
    kept = student
    if typed == ["task=nuclei_instance"]:
        kept = [o for o in student if not o.startswith(("task", "+task", "data.", "optim", "backbone"))]
    assert main([*kept, *typed, f"run_dir={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_checkpoint_of_another_teacher_is_refused(student, taught, teacher, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(taught, run)
    shutil.copytree(teacher, tmp_path / "other")
    head = load_file(tmp_path / "other" / "head.safetensors")
    shifted = {key: value + 1 if value.is_floating_point() else value for key, value in head.items()}
    save_file(shifted, tmp_path / "other" / "head.safetensors")
    text = (run / "overrides.yaml").read_text().replace(str(teacher), str(tmp_path / "other"))
    (run / "overrides.yaml").write_text(text)
    assert main([f"resume={run}", "trainer.max_steps=7"]) == 2
    assert "Use the same teacher" in capsys.readouterr().err
