"""Two processes (gloo) measure and train what one does, and write once."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.spawn import spawn

from dense_heads.__main__ import main
from dense_heads.losses.depth import DepthLoss
from dense_heads.ops.batch_norm import BatchNorm2d
from tests.factories import make_depth_folders

TWO = ["trainer.devices=2", "trainer.strategy=ddp"]
SHORT = ["trainer.max_steps=3", "trainer.val_check_interval=3"]
# SGD: AdamW makes steps of rounding errors where the true gradient is 0.
LEARNS = ["backbone.trainable=true", "optim=sgd", "optim.backbone_lr=1e-2"]
SGD = ["optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas", "optim.lr=1e-2", "optim.warmup=0"]


def run(arguments):
    environment = {key: value for key, value in os.environ.items() if key != "DENSE_HEADS_RUN_FOLDER"}
    done = subprocess.run(
        [sys.executable, "-m", "dense_heads", *arguments], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def one_and_two(typed, folder):
    """The same run in one process and in two."""
    assert main([*typed, f"run_dir={folder / 'one'}"]) == 0
    run([*typed, *TWO, f"run_dir={folder / 'two'}"])
    return folder / "one", folder / "two"


def curves(folder):
    """All numbers of all steps, but for the speed."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{key: float(x) for key, x in row.items() if x and key != "images_per_s"} for row in rows]


def assert_same_training(one, two, *names):
    """Curves and the weights in the files `names` differ by rounding: a bias is what is left of gradients' sums."""
    for ours, theirs in zip(curves(two), curves(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for name in names:
        ours, theirs = load_file(two / name), load_file(one / name)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4 * float(value.abs().max()), msg=key)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """3 validation images, so that the shares are unequal."""
    return one_and_two(tiny, tmp_path_factory.mktemp("runs"))


def test_two_processes_train_what_one_does(runs):
    one, two = (load_file(folder / "head.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


def test_pictures_artefact_and_report_are_written_once(runs):
    one, two = ({str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} for folder in runs)
    pictures = {name for name in two if name.startswith("pictures/")}
    assert len(pictures) == 2 and pictures < one  # the first process draws what it sees: every second image
    assert one - two == {"pictures/val/pic101.png"}
    assert {"report.html", "card.json", "head.safetensors", "metrics.json"} <= two
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in runs]
    assert [line.split(",")[0] for line in rows[0]] == [line.split(",")[0] for line in rows[1]]


def test_two_processes_fill_and_read_one_cache(runs, tiny, tmp_path):
    """As many views as there are epochs, so that an uncached run in one process sees the same."""
    features = tmp_path / "features"
    cached = [*tiny, *TWO, "cache=disk", "cache.views=4", "cache.dtype=float32", f"cache.dir={features}"]
    run([*cached, f"run_dir={tmp_path / 'cold'}"])
    stored = {path: path.stat().st_mtime_ns for path in features.rglob("*.safetensors")}
    run([*cached, f"run_dir={tmp_path / 'warm'}"])
    assert stored and stored == {path: path.stat().st_mtime_ns for path in features.rglob("*.safetensors")}
    one, cold, warm = (
        load_file(folder / "head.safetensors") for folder in (runs[0], tmp_path / "cold", tmp_path / "warm")
    )
    for key in one:
        assert torch.equal(cold[key], warm[key])
        torch.testing.assert_close(one[key], warm[key], rtol=1e-3, atol=1e-4)


def test_two_processes_count_every_image_once(runs):
    """The same head: equal per-class counts, so equal confusion matrices."""
    trained = runs[0]
    measured = json.loads((trained / "metrics.json").read_text())
    run(["mode=evaluate", f"model={trained}", *TWO])
    (folder,) = (trained / "evaluate").iterdir()
    again = json.loads((folder / "metrics.json").read_text())
    assert again["per_class"] == measured["per_class"]
    assert again["metrics"] == measured["metrics"]


def assert_same_student(one, two):
    """That of the main run, and in the report the teacher and the student that learnt without it."""
    assert_same_training(one, two, "backbone.safetensors", "head.safetensors")
    assert_same_training(one / "alone", two / "alone")
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (two, one))
    assert ours["metrics"] == pytest.approx(theirs["metrics"], rel=1e-4)
    for key in ("teacher", "alone"):
        metrics = (found["distillation"][key]["metrics"] for found in (ours, theirs))
        assert next(metrics) == pytest.approx(next(metrics), rel=1e-4)


def test_a_backbone_learns_segmentation_alone_and_from_a_teacher(tiny, runs, unlabelled, tmp_path):
    """Crops of small images are padded, so that the processes' shares of pixels are unequal."""
    taught = [f"distill={runs[0]}", f"data.unlabeled={unlabelled}", "task.distill.features=0.5"]
    assert_same_student(*one_and_two([*tiny, *SHORT, *LEARNS, *taught], tmp_path))


def test_a_backbone_learns_depth_alone_and_from_a_teacher(unlabelled, tmp_path):
    """Images without labels have no measurement, so that the shares are unequal."""
    data = make_depth_folders(tmp_path / "data")
    typed = [
        "task=depth", f"data.root={data}", "backbone=vitn14_reg", "backbone.weights=null", "head=linear_depth",
        "backbone.precision=float32", "data.image_size=[42,56]", "data.batch_size=4", "data.num_workers=0",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", *SHORT, "task.protocol.lr=1e-2",
        "+task.loss.sig_warmup=1", "+task.data.format.splits={train:training,val:validation}",
    ]  # fmt: skip
    assert main([*typed, f"run_dir={tmp_path / 'teacher'}"]) == 0
    taught = [f"distill={tmp_path / 'teacher'}", f"data.unlabeled={unlabelled}"]
    assert_same_student(*one_and_two([*typed, *LEARNS, *taught], tmp_path))


def test_pretraining_learns_the_same(tiny_ssl, tmp_path):
    objective = ["task.objective.features=1", "task.objective.koleo_gather=true", "task.backbone.drop_path=0"]
    assert_same_training(*one_and_two([*tiny_ssl, *SHORT, *SGD, *objective], tmp_path), "backbone.safetensors")


def test_distillation_of_features_learns_the_same(tiny_ssl, tmp_path):
    kept = [o for o in tiny_ssl if not o.startswith(("task=", "backbone", "task.objective", "+task.objective"))]
    pair = ["backbone=vitt14_reg", "backbone.weights=null", "teacher=vitn14_reg", "teacher.weights=null"]
    typed = ["task=distillation", *kept, *pair, "task.method=features", "task.protocol.precision=float32"]
    typed += ["task.backbone.drop_path=0"]
    assert_same_training(*one_and_two([*typed, *SHORT, *SGD], tmp_path), "backbone.safetensors")


def _depth_of(share, rank):
    """Losses of all kinds and gradients of a process's share; the first image has few measurements, one has none."""
    generator = torch.Generator().manual_seed(0)
    depth = 1 + torch.rand(4, 12, 16, generator=generator)
    target = 1 + torch.rand(4, 12, 16, generator=generator)
    target[0, 2:], target[3] = 0, 0
    depth, target = depth.chunk(4 // share)[rank].requires_grad_(), target.chunk(4 // share)[rank]
    found = []
    for name in ("sig", "gradient", "ssi", "l1", "huber", "relative"):
        loss = DepthLoss(**{**dict.fromkeys(("sig", "gradient"), 0.0), name: 1.0}, sig_warmup=0)(depth, target)
        found.append((loss.detach(), *torch.autograd.grad(loss, depth)))
    return found


def _depth_share(rank, port, path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.save(_depth_of(2, rank), f"{path}{rank}")
    torch.distributed.destroy_process_group()


def test_depth_losses_over_processes_are_those_of_the_whole_batch(tmp_path):
    spawn(_depth_share, args=(29100 + os.getpid() % 400, str(tmp_path / "rank")), nprocs=2)
    shares = [torch.load(f"{tmp_path / 'rank'}{rank}", weights_only=True) for rank in (0, 1)]
    for (loss, gradient), *parts in zip(_depth_of(4, 0), *shares, strict=True):
        torch.testing.assert_close(torch.stack([part[0] for part in parts]).mean(), loss)
        torch.testing.assert_close(torch.cat([part[1] for part in parts]) / 2, gradient)  # DDP takes the mean


def _normalise_share(rank, port, path, with_gradient):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    norm, x = norm_and_input()
    share = x.chunk(2)[rank].requires_grad_(with_gradient)
    out = norm(share)
    if with_gradient:
        out.square().sum().backward()
    torch.save({"out": out.detach(), "grad": share.grad, "state": norm.state_dict()}, f"{path}{rank}")
    torch.distributed.destroy_process_group()


def norm_and_input():
    generator = torch.Generator().manual_seed(0)
    norm = BatchNorm2d(3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(3, generator=generator))
        norm.bias.copy_(torch.randn(3, generator=generator))
    return norm, 5 + 2 * torch.randn(4, 3, 5, 6, generator=generator)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_batch_norm_over_processes_is_that_of_the_whole_batch(tmp_path, with_gradient):
    norm, x = norm_and_input()
    plain = torch.nn.BatchNorm2d(3)
    plain.load_state_dict(norm.state_dict())
    x.requires_grad_(with_gradient)
    expected = plain(x)
    if with_gradient:
        expected.square().sum().backward()
    port = 29500 + os.getpid() % 400 + with_gradient
    spawn(_normalise_share, args=(port, str(tmp_path / "rank"), with_gradient), nprocs=2)
    shares = [torch.load(f"{tmp_path / 'rank'}{rank}", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([share["out"] for share in shares]), expected.detach(), rtol=1e-5, atol=1e-5)
    for share in shares:
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(share["state"][key], value)
    if with_gradient:
        torch.testing.assert_close(torch.cat([share["grad"] for share in shares]), x.grad, rtol=1e-4, atol=1e-4)
